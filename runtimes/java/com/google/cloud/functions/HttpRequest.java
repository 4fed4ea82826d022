package com.google.cloud.functions;

import java.util.List;
import java.util.Map;
import java.util.Optional;

/** An HTTP request. */
public interface HttpRequest extends HttpMessage {
    String getMethod();

    String getUri();

    String getPath();

    Optional<String> getQuery();

    Map<String, List<String>> getQueryParameters();

    default Optional<String> getFirstQueryParameter(String name) {
        List<String> values = getQueryParameters().get(name);
        return values == null || values.isEmpty() ? Optional.empty() : Optional.of(values.get(0));
    }

    /** A part of a request of type multipart/form-data. */
    interface HttpPart extends HttpMessage {
        Optional<String> getFileName();
    }

    /** Returns the parts by name; IllegalStateException if the request has none. */
    Map<String, HttpPart> getParts();
}
