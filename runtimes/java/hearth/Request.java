package hearth;

import com.google.cloud.functions.HttpRequest;
import com.sun.net.httpserver.HttpExchange;
import java.io.InputStream;
import java.net.URLDecoder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.TreeMap;

/** A request as a Function sees it. */
final class Request extends Message implements HttpRequest {
    private final HttpExchange exchange;

    Request(HttpExchange exchange) {
        super(headers(exchange));
        this.exchange = exchange;
    }

    private static Map<String, List<String>> headers(HttpExchange exchange) {
        Map<String, List<String>> headers = new TreeMap<>(String.CASE_INSENSITIVE_ORDER);
        headers.putAll(exchange.getRequestHeaders());
        return headers;
    }

    @Override
    InputStream body() {
        return exchange.getRequestBody();
    }

    @Override
    public String getMethod() {
        return exchange.getRequestMethod();
    }

    @Override
    public String getUri() {
        String host = getFirstHeader("Host").orElse("localhost");
        return exchange.getRequestURI().isAbsolute() ? exchange.getRequestURI().toString() : "http://" + host + exchange.getRequestURI();
    }

    @Override
    public String getPath() {
        return exchange.getRequestURI().getRawPath();
    }

    @Override
    public Optional<String> getQuery() {
        return Optional.ofNullable(exchange.getRequestURI().getRawQuery());
    }

    @Override
    public Map<String, List<String>> getQueryParameters() {
        Map<String, List<String>> parameters = new LinkedHashMap<>();
        for (String pair : getQuery().orElse("").split("&")) {
            if (!pair.isEmpty()) {
                String[] both = pair.split("=", 2);
                parameters.computeIfAbsent(decoded(both[0]), name -> new ArrayList<>()).add(both.length < 2 ? "" : decoded(both[1]));
            }
        }
        return parameters;
    }

    private static String decoded(String text) {
        try {
            return URLDecoder.decode(text, StandardCharsets.UTF_8);
        } catch (IllegalArgumentException e) {
            return text; // it was not encoded
        }
    }

    @Override
    public Map<String, HttpPart> getParts() {
        return Part.parse(this);
    }
}
