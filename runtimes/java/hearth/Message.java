package hearth;

import com.google.cloud.functions.HttpMessage;
import java.io.BufferedReader;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.nio.charset.Charset;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Headers and a body. */
abstract class Message implements HttpMessage {
    private static final Pattern CHARSET = Pattern.compile(";\\s*charset\\s*=\\s*\"?([^\\s;\"]+)", Pattern.CASE_INSENSITIVE);

    private final Map<String, List<String>> headers; // whatever the case of their names
    private BufferedReader reader;
    private boolean streamed;

    Message(Map<String, List<String>> headers) {
        this.headers = headers;
    }

    abstract InputStream body();

    @Override
    public final Map<String, List<String>> getHeaders() {
        return headers;
    }

    @Override
    public final Optional<String> getContentType() {
        return getFirstHeader("Content-Type");
    }

    @Override
    public final long getContentLength() {
        return getFirstHeader("Content-Length").filter(text -> text.matches("[0-9]{1,18}")).map(Long::parseLong).orElse(-1L);
    }

    @Override
    public final Optional<String> getCharacterEncoding() {
        return getContentType().map(CHARSET::matcher).filter(Matcher::find).map(found -> found.group(1));
    }

    @Override
    public final InputStream getInputStream() {
        if (reader != null) {
            throw new IllegalStateException("getReader was called before");
        }
        streamed = true;
        return body();
    }

    @Override
    public final BufferedReader getReader() {
        if (streamed) {
            throw new IllegalStateException("getInputStream was called before");
        }
        if (reader == null) {
            Charset charset = getCharacterEncoding().map(Charset::forName).orElse(StandardCharsets.UTF_8);
            reader = new BufferedReader(new InputStreamReader(body(), charset));
        }
        return reader;
    }
}
