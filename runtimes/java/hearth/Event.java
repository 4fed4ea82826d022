package hearth;

import io.cloudevents.CloudEvent;
import io.cloudevents.CloudEventData;
import io.cloudevents.SpecVersion;
import java.net.URI;
import java.net.URLDecoder;
import java.nio.charset.StandardCharsets;
import java.time.OffsetDateTime;
import java.time.format.DateTimeParseException;
import java.util.Base64;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.stream.Collectors;

/** A CloudEvent as it came over HTTP, in binary or structured mode. */
final class Event implements CloudEvent {
    /** A request in which there is no CloudEvent. */
    static final class Malformed extends Exception {
        private static final long serialVersionUID = 1;

        Malformed(String message) {
            super("no CloudEvent: " + message);
        }
    }

    private static final Set<String> ATTRIBUTES = Set.of("specversion", "id", "type", "source", "datacontenttype", "dataschema", "subject", "time");

    private final Map<String, String> attributes = new TreeMap<>(); // and extensions
    private final byte[] data; // null if there is none
    private final SpecVersion version;
    private final URI source;
    private final URI schema;
    private final OffsetDateTime time;

    private Event(Map<String, String> attributes, byte[] data) throws Malformed {
        this.attributes.putAll(attributes);
        this.data = data;
        for (String name : List.of("specversion", "id", "source", "type")) {
            if (attributes.getOrDefault(name, "").isEmpty()) {
                throw new Malformed("attribute " + name + " is missing");
            }
        }
        try {
            version = SpecVersion.parse(attributes.get("specversion"));
            source = URI.create(attributes.get("source"));
            schema = attributes.containsKey("dataschema") ? URI.create(attributes.get("dataschema")) : null;
            time = attributes.containsKey("time") ? OffsetDateTime.parse(attributes.get("time")) : null;
        } catch (IllegalArgumentException | DateTimeParseException e) {
            throw new Malformed(e.getMessage());
        }
    }

    /** Returns the event of a request with these headers, whose names are in lower case, and this body. */
    static Event read(Map<String, String> headers, byte[] body) throws Malformed {
        String type = headers.getOrDefault("content-type", "");
        if (type.split(";", 2)[0].strip().equalsIgnoreCase("application/cloudevents+json")) {
            return structured(body);
        }
        Map<String, String> attributes = new TreeMap<>();
        for (Map.Entry<String, String> header : headers.entrySet()) {
            if (header.getKey().startsWith("ce-")) {
                attributes.put(header.getKey().substring(3), decoded(header.getValue()));
            }
        }
        if (!type.isEmpty()) {
            attributes.put("datacontenttype", type);
        }
        return new Event(attributes, body.length == 0 ? null : body);
    }

    private static String decoded(String value) throws Malformed {
        try {
            return URLDecoder.decode(value.replace("+", "%2B"), StandardCharsets.UTF_8);
        } catch (IllegalArgumentException e) {
            throw new Malformed(e.getMessage());
        }
    }

    private static Event structured(byte[] body) throws Malformed {
        try {
            if (!(Json.parse(new String(body, StandardCharsets.UTF_8)) instanceof Map<?, ?> event)) {
                throw new Malformed("no JSON object");
            }
            Map<String, String> attributes = new TreeMap<>();
            byte[] data = null;
            for (Map.Entry<?, ?> entry : event.entrySet()) {
                String name = ((String) entry.getKey()).toLowerCase(Locale.ROOT);
                Object value = entry.getValue();
                if (name.equals("data")) {
                    data = bytes(value, event.get("datacontenttype"));
                } else if (name.equals("data_base64")) {
                    data = Base64.getDecoder().decode(String.valueOf(value));
                } else if (value instanceof Map || value instanceof List) {
                    throw new Malformed("attribute " + name + " has no simple value");
                } else if (value != null) {
                    attributes.put(name, value instanceof Json.Number number ? number.text() : value.toString());
                }
            }
            return new Event(attributes, data);
        } catch (Json.Malformed | IllegalArgumentException e) {
            throw new Malformed(e.getMessage());
        }
    }

    /** The data as bytes: a text that is not declared as JSON is itself. */
    private static byte[] bytes(Object value, Object type) {
        boolean json = type == null || type.toString().matches(".*[/+]json\\b.*");
        String text = value instanceof String string && !json ? string : Json.write(value);
        return value == null ? null : text.getBytes(StandardCharsets.UTF_8);
    }

    @Override
    public CloudEventData getData() {
        return data == null ? null : () -> data;
    }

    @Override
    public SpecVersion getSpecVersion() {
        return version;
    }

    @Override
    public String getId() {
        return attributes.get("id");
    }

    @Override
    public String getType() {
        return attributes.get("type");
    }

    @Override
    public URI getSource() {
        return source;
    }

    @Override
    public String getDataContentType() {
        return attributes.get("datacontenttype");
    }

    @Override
    public URI getDataSchema() {
        return schema;
    }

    @Override
    public String getSubject() {
        return attributes.get("subject");
    }

    @Override
    public OffsetDateTime getTime() {
        return time;
    }

    @Override
    public Object getAttribute(String name) {
        switch (name) {
            case "specversion":
                return version;
            case "source":
                return source;
            case "dataschema":
                return schema;
            case "time":
                return time;
            default:
                if (!ATTRIBUTES.contains(name)) {
                    throw new IllegalArgumentException(name + " is no attribute of CloudEvents " + version);
                }
                return attributes.get(name);
        }
    }

    @Override
    public Set<String> getAttributeNames() {
        return attributes.keySet().stream().filter(ATTRIBUTES::contains).collect(Collectors.toSet());
    }

    @Override
    public Object getExtension(String name) {
        return ATTRIBUTES.contains(name) ? null : attributes.get(name);
    }

    @Override
    public Set<String> getExtensionNames() {
        return attributes.keySet().stream().filter(name -> !ATTRIBUTES.contains(name)).collect(Collectors.toSet());
    }
}
