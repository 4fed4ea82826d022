package io.cloudevents;

/** An event: the names of the CloudEvents SDK for Java, so that what was compiled against it runs here. */
public interface CloudEvent extends CloudEventContext {
    /** Returns the data, or null if there is none. */
    CloudEventData getData();
}
