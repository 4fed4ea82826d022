package com.google.cloud.functions;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStream;
import java.util.List;
import java.util.Map;
import java.util.Optional;

/** What a request and a part of one have in common. */
public interface HttpMessage {
    Optional<String> getContentType();

    /** Returns the length of the body as the headers tell it, or -1. */
    long getContentLength();

    Optional<String> getCharacterEncoding();

    /** Returns the body; always the same stream, and IllegalStateException after getReader. */
    InputStream getInputStream() throws IOException;

    /** Returns the body as text; always the same reader, and IllegalStateException after getInputStream. */
    BufferedReader getReader() throws IOException;

    Map<String, List<String>> getHeaders();

    default Optional<String> getFirstHeader(String name) {
        List<String> values = getHeaders().get(name);
        return values == null || values.isEmpty() ? Optional.empty() : Optional.of(values.get(0));
    }
}
