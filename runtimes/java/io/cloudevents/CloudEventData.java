package io.cloudevents;

/** The data of an event. */
public interface CloudEventData {
    byte[] toBytes();
}
