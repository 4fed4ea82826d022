package hearth;

import com.google.cloud.functions.HttpResponse;
import com.sun.net.httpserver.HttpExchange;
import java.io.BufferedWriter;
import java.io.IOException;
import java.io.OutputStream;
import java.io.OutputStreamWriter;
import java.nio.charset.Charset;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Set;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * The answer to a request. The head waits until the body is flushed, no longer fits the buffer, or is whole: then its length is
 * known.
 */
final class Response implements HttpResponse {
    private static final int BUFFER = 16 << 10;
    private static final int NO_CONTENT = 204;
    private static final int NOT_MODIFIED = 304;
    private static final Set<String> OURS = Set.of("content-length", "transfer-encoding", "connection", "keep-alive");
    private static final Pattern CHARSET = Pattern.compile(";\\s*charset\\s*=\\s*\"?([^\\s;\"]+)", Pattern.CASE_INSENSITIVE);

    private final HttpExchange exchange;
    private final Body body = new Body();
    private int status = 200;
    private boolean streamed;
    private BufferedWriter writer;

    Response(HttpExchange exchange) {
        this.exchange = exchange;
    }

    @Override
    public void setStatusCode(int code) {
        status = code;
    }

    @Override
    public void setStatusCode(int code, String message) {
        status = code; // HTTP knows no other message than the code's
    }

    @Override
    public void setContentType(String contentType) {
        exchange.getResponseHeaders().set("Content-Type", contentType);
    }

    @Override
    public Optional<String> getContentType() {
        return Optional.ofNullable(exchange.getResponseHeaders().getFirst("Content-Type"));
    }

    @Override
    public void appendHeader(String header, String value) {
        if (!OURS.contains(header.toLowerCase(java.util.Locale.ROOT))) { // how the bytes are carried is the server's matter
            exchange.getResponseHeaders().add(header, value);
        }
    }

    @Override
    public Map<String, List<String>> getHeaders() {
        return exchange.getResponseHeaders();
    }

    @Override
    public OutputStream getOutputStream() {
        if (writer != null) {
            throw new IllegalStateException("getWriter was called before");
        }
        streamed = true;
        return body;
    }

    @Override
    public BufferedWriter getWriter() {
        if (streamed) {
            throw new IllegalStateException("getOutputStream was called before");
        }
        if (writer == null) {
            Charset charset = getContentType().map(CHARSET::matcher).filter(Matcher::find)
                    .map(found -> Charset.forName(found.group(1))).orElse(StandardCharsets.UTF_8);
            writer = new BufferedWriter(new OutputStreamWriter(body, charset));
        }
        return writer;
    }

    /** Sends what has not been sent. */
    void finish() throws IOException {
        body.whole = true;
        if (writer != null) {
            writer.flush();
        }
        body.send();
        body.close();
    }

    /** Answers with nothing but this; false if the Function's own answer is on its way already. */
    boolean replace(int code, String text) throws IOException {
        if (body.out != null) {
            return false;
        }
        exchange.getResponseHeaders().clear();
        setContentType("text/plain");
        status = code;
        body.length = 0;
        body.write(text.getBytes(StandardCharsets.UTF_8));
        body.whole = true;
        body.send();
        body.close();
        return true;
    }

    /** The body, until it has to be sent. */
    private final class Body extends OutputStream {
        private final byte[] buffer = new byte[BUFFER];
        private int length;
        private OutputStream out; // there as soon as the head was sent
        private boolean whole; // nothing comes any more

        @Override
        public void write(int b) throws IOException {
            write(new byte[] {(byte) b}, 0, 1);
        }

        @Override
        public void write(byte[] bytes, int offset, int count) throws IOException {
            if (count > BUFFER - length) {
                send();
            }
            if (count > BUFFER) {
                out.write(bytes, offset, count);
                return;
            }
            System.arraycopy(bytes, offset, buffer, length, count);
            length += count;
        }

        @Override
        public void flush() throws IOException {
            if (!whole) { // the Function's, not our own at the end
                send();
                out.flush();
            }
        }

        private void send() throws IOException {
            if (out == null) {
                boolean none = exchange.getRequestMethod().equals("HEAD") || status == NO_CONTENT || status == NOT_MODIFIED;
                long told = none || whole && length == 0 ? -1 : whole ? length : 0; // in the server's words 0 is an unknown length
                exchange.sendResponseHeaders(status, told);
                out = none ? OutputStream.nullOutputStream() : exchange.getResponseBody();
            }
            out.write(buffer, 0, length);
            length = 0;
        }

        @Override
        public void close() throws IOException {
            if (whole) {
                out.close();
            } else {
                flush();
            }
        }
    }
}
