package com.google.cloud.functions;

import io.cloudevents.CloudEvent;

/** A Function of CloudEvents. */
@FunctionalInterface
public interface CloudEventsFunction {
    void accept(CloudEvent event) throws Exception;
}
