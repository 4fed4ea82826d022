package hearth;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * JSON texts of RFC 8259. Objects are maps, arrays lists; strings, Boolean and null are themselves, and numbers Number, to be
 * written again as they were read.
 */
final class Json {
    private static final int DEEPEST = 100;

    /** A text that is no JSON. */
    static final class Malformed extends Exception {
        private static final long serialVersionUID = 1;

        Malformed(String message) {
            super(message);
        }
    }

    /** A number as it was written. */
    record Number(String text) {}

    private final String text;
    private int at;
    private int depth;

    private Json(String text) {
        this.text = text;
    }

    static Object parse(String text) throws Malformed {
        Json parser = new Json(text);
        Object value = parser.value();
        parser.space();
        if (parser.at < text.length()) {
            throw parser.wrong();
        }
        return value;
    }

    private Malformed wrong() {
        return new Malformed(at < text.length() ? "no JSON at character " + at : "the JSON ends early");
    }

    private void space() {
        while (at < text.length() && " \t\r\n".indexOf(text.charAt(at)) >= 0) {
            at++;
        }
    }

    private boolean take(char wanted) {
        space();
        if (at < text.length() && text.charAt(at) == wanted) {
            at++;
            return true;
        }
        return false;
    }

    private void need(char wanted) throws Malformed {
        if (!take(wanted)) {
            throw wrong();
        }
    }

    private Object value() throws Malformed {
        space();
        if (at >= text.length() || ++depth > DEEPEST) {
            throw wrong();
        }
        try {
            switch (text.charAt(at)) {
                case '{':
                    return object();
                case '[':
                    return array();
                case '"':
                    return string();
                case 't':
                    return word("true", true);
                case 'f':
                    return word("false", false);
                case 'n':
                    return word("null", null);
                default:
                    return number();
            }
        } finally {
            depth--;
        }
    }

    private Object word(String word, Object meaning) throws Malformed {
        if (!text.startsWith(word, at)) {
            throw wrong();
        }
        at += word.length();
        return meaning;
    }

    private Map<String, Object> object() throws Malformed {
        Map<String, Object> object = new LinkedHashMap<>();
        need('{');
        if (take('}')) {
            return object;
        }
        do {
            space();
            String name = string();
            need(':');
            object.put(name, value());
        } while (take(','));
        need('}');
        return object;
    }

    private List<Object> array() throws Malformed {
        List<Object> array = new ArrayList<>();
        need('[');
        if (take(']')) {
            return array;
        }
        do {
            array.add(value());
        } while (take(','));
        need(']');
        return array;
    }

    private String string() throws Malformed {
        need('"');
        StringBuilder string = new StringBuilder();
        while (at < text.length()) {
            char c = text.charAt(at++);
            if (c == '"') {
                return string.toString();
            }
            if (c < ' ') {
                break;
            }
            string.append(c == '\\' ? escaped() : c);
        }
        throw wrong();
    }

    private char escaped() throws Malformed {
        char c = at < text.length() ? text.charAt(at++) : 0;
        int simple = "\"\\/bfnrt".indexOf(c);
        if (simple >= 0) {
            return "\"\\/\b\f\n\r\t".charAt(simple);
        }
        if (c != 'u' || at + 4 > text.length()) {
            throw wrong();
        }
        int code = 0;
        for (int end = at + 4; at < end; at++) {
            int digit = Character.digit(text.charAt(at), 16);
            if (digit < 0) {
                throw wrong();
            }
            code = code << 4 | digit;
        }
        return (char) code;
    }

    private Number number() throws Malformed {
        int begin = at;
        at += text.startsWith("-", at) ? 1 : 0;
        int whole = digits();
        if (whole > 1 && text.charAt(at - whole) == '0') {
            throw wrong();
        }
        if (text.startsWith(".", at)) {
            at++;
            digits();
        }
        if (at < text.length() && "eE".indexOf(text.charAt(at)) >= 0) {
            at++;
            at += text.startsWith("-", at) || text.startsWith("+", at) ? 1 : 0;
            digits();
        }
        return new Number(text.substring(begin, at));
    }

    private int digits() throws Malformed {
        int begin = at;
        while (at < text.length() && text.charAt(at) >= '0' && text.charAt(at) <= '9') {
            at++;
        }
        if (at == begin) {
            throw wrong();
        }
        return at - begin;
    }

    /** Returns what a text means, or null if it is no JSON. */
    static Object parseOrNull(String text) {
        try {
            return parse(text);
        } catch (Malformed e) {
            return null;
        }
    }

    /** Writes what parse gives, and other Objects by their toString, as numbers. */
    static String write(Object value) {
        StringBuilder out = new StringBuilder();
        write(value, out);
        return out.toString();
    }

    private static void write(Object value, StringBuilder out) {
        if (value instanceof Map<?, ?> map) {
            char before = '{';
            for (Map.Entry<?, ?> entry : map.entrySet()) {
                out.append(before);
                quote(String.valueOf(entry.getKey()), out);
                out.append(':');
                write(entry.getValue(), out);
                before = ',';
            }
            out.append(map.isEmpty() ? "{}" : "}");
        } else if (value instanceof List<?> list) {
            char before = '[';
            for (Object each : list) {
                out.append(before);
                write(each, out);
                before = ',';
            }
            out.append(list.isEmpty() ? "[]" : "]");
        } else if (value instanceof String string) {
            quote(string, out);
        } else if (value instanceof Number number) {
            out.append(number.text());
        } else {
            out.append(value);
        }
    }

    private static void quote(String string, StringBuilder out) {
        out.append('"');
        for (int i = 0; i < string.length(); i++) {
            char c = string.charAt(i);
            if (c == '"' || c == '\\') {
                out.append('\\').append(c);
            } else if (c < ' ' || Character.isSurrogate(c)) {
                out.append(String.format("\\u%04x", (int) c));
            } else {
                out.append(c);
            }
        }
        out.append('"');
    }
}
