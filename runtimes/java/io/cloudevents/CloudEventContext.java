package io.cloudevents;

/** All of an event but its data. */
public interface CloudEventContext extends CloudEventAttributes, CloudEventExtensions {}
