package io.cloudevents;

import java.net.URI;
import java.time.OffsetDateTime;
import java.util.Set;
import java.util.stream.Collectors;

/** The attributes of an event; those that it does not have are null. */
public interface CloudEventAttributes {
    SpecVersion getSpecVersion();

    String getId();

    String getType();

    URI getSource();

    String getDataContentType();

    URI getDataSchema();

    String getSubject();

    OffsetDateTime getTime();

    Object getAttribute(String attributeName) throws IllegalArgumentException;

    default Set<String> getAttributeNames() {
        return getSpecVersion().getAllAttributes().stream().filter(name -> getAttribute(name) != null).collect(Collectors.toSet());
    }
}
