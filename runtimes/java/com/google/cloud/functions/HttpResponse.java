package com.google.cloud.functions;

import java.io.BufferedWriter;
import java.io.IOException;
import java.io.OutputStream;
import java.util.List;
import java.util.Map;
import java.util.Optional;

/** The answer to an HTTP request. */
public interface HttpResponse {
    void setStatusCode(int code);

    void setStatusCode(int code, String message);

    void setContentType(String contentType);

    Optional<String> getContentType();

    void appendHeader(String header, String value);

    Map<String, List<String>> getHeaders();

    /** Returns the body to be; IllegalStateException after getWriter. */
    OutputStream getOutputStream() throws IOException;

    /** Returns the body to be, as text; IllegalStateException after getOutputStream. */
    BufferedWriter getWriter() throws IOException;
}
