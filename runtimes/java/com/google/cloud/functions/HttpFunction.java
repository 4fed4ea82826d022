package com.google.cloud.functions;

/** A Function that answers HTTP requests: the names of the Functions Framework for Java, so that what was compiled against it runs. */
@FunctionalInterface
public interface HttpFunction {
    void service(HttpRequest request, HttpResponse response) throws Exception;
}
