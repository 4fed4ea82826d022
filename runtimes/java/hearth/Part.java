package hearth;

import com.google.cloud.functions.HttpRequest;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** A part of a request of type multipart/form-data (RFC 7578). */
final class Part extends Message implements HttpRequest.HttpPart {
    private static final Pattern BOUNDARY = Pattern.compile("(?i)multipart/form-data\\s*;.*?boundary=(?:\"([^\"]{1,70})\"|([^\\s;\"]{1,70})).*");
    private static final int MAX_PARTS = 1000;

    private final InputStream body;

    private Part(Map<String, List<String>> headers, byte[] body) {
        super(headers);
        this.body = new ByteArrayInputStream(body);
    }

    @Override
    InputStream body() {
        return body;
    }

    @Override
    public Optional<String> getFileName() {
        return parameter("filename");
    }

    private Optional<String> parameter(String name) {
        Pattern pattern = Pattern.compile(";\\s*" + name + "=(?:\"([^\"]*)\"|([^\\s;\"]+))", Pattern.CASE_INSENSITIVE);
        return getFirstHeader("Content-Disposition").map(pattern::matcher).filter(Matcher::find).map(Part::eitherGroup);
    }

    private static String eitherGroup(Matcher matcher) {
        String quoted = matcher.group(1) != null ? matcher.group(1) : matcher.group(2);
        return new String(quoted.getBytes(StandardCharsets.ISO_8859_1), StandardCharsets.UTF_8);
    }

    /** Returns the parts of a request by name; IllegalStateException if it has another type or cannot be cut into parts. */
    static Map<String, HttpRequest.HttpPart> parse(HttpRequest request) {
        Matcher type = BOUNDARY.matcher(request.getContentType().orElse(""));
        if (!type.matches()) {
            throw new IllegalStateException("the request is not of type multipart/form-data with a boundary");
        }
        String whole;
        try {
            whole = "\r\n" + new String(request.getInputStream().readAllBytes(), StandardCharsets.ISO_8859_1); // a byte a character
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
        String mark = "\r\n--" + eitherGroup(type);
        Map<String, HttpRequest.HttpPart> parts = new LinkedHashMap<>();
        for (int at = whole.indexOf(mark), next; at >= 0 && !whole.startsWith("--", at + mark.length()); at = next) {
            next = whole.indexOf(mark, at + mark.length());
            int head = whole.indexOf("\r\n", at + mark.length());
            int body = whole.indexOf("\r\n\r\n", head);
            if (next < 0 || body < 0 || body > next || parts.size() >= MAX_PARTS) {
                throw new IllegalStateException("the request's parts are malformed or too many");
            }
            byte[] content = whole.substring(Math.min(body + 4, next), next).getBytes(StandardCharsets.ISO_8859_1);
            Part part = new Part(headers(whole.substring(head, body)), content);
            part.parameter("name").ifPresent(name -> parts.put(name, part));
        }
        return parts;
    }

    private static Map<String, List<String>> headers(String text) {
        Map<String, List<String>> headers = new TreeMap<>(String.CASE_INSENSITIVE_ORDER);
        for (String line : text.split("\r\n")) {
            String[] both = line.split(":", 2);
            if (both.length == 2) {
                headers.computeIfAbsent(both[0].strip(), name -> new ArrayList<>()).add(both[1].strip());
            }
        }
        return headers;
    }
}
