import com.google.cloud.functions.HttpFunction;
import com.google.cloud.functions.HttpRequest;
import com.google.cloud.functions.HttpResponse;
import java.io.BufferedReader;
import java.io.FileReader;
import java.io.IOException;
import java.io.OutputStream;
import java.net.URLDecoder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Instant;
import java.time.ZoneId;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.CyclicBarrier;
import java.util.stream.Collectors;

/** What the conformance tests ask of a Function, in Java. */
public final class Main implements HttpFunction {
    private final CyclicBarrier barrier = new CyclicBarrier(50);
    private final CountDownLatch released = new CountDownLatch(1);

    @Override
    public void service(HttpRequest request, HttpResponse response) throws Exception {
        switch (request.getPath()) {
            case "/":
                response.getWriter().write("hello, " + System.getenv("GREETING"));
                break;
            case "/request":
                describe(request, response);
                break;
            case "/echo":
                request.getInputStream().transferTo(response.getOutputStream());
                break;
            case "/stream":
                response.getWriter().write("first\n");
                response.getWriter().flush();
                released.await();
                response.getWriter().write("second\n");
                break;
            case "/release":
                released.countDown();
                response.setStatusCode(204);
                break;
            case "/together":
                barrier.await();
                response.getWriter().write("together");
                break;
            case "/cut":
                response.getWriter().write("first\n");
                response.getWriter().flush();
                throw new IllegalStateException("the reason");
            case "/fail":
                throw new IllegalStateException("the reason");
            case "/random":
                response.getWriter().write(String.valueOf(Math.random())); // others depend on which thread is asked
                break;
            case "/hour":
                response.getWriter().write(String.valueOf(Instant.EPOCH.atZone(ZoneId.systemDefault()).getHour()));
                break;
            case "/data":
                data(response);
                break;
            case "/line":
                System.out.println("begin " + "x".repeat(3000) + " " + request.getFirstQueryParameter("n").orElse("") + " end");
                break;
            case "/unread":
                response.getWriter().write("unread");
                break;
            case "/stdin":
                response.getWriter().write(Files.readSymbolicLink(Path.of("/proc/self/fd/0")).toString());
                break;
            case "/parts":
                HttpRequest.HttpPart part = request.getParts().get("file");
                response.getWriter().write(part.getFileName().orElse("") + "|" + part.getContentType().orElse("") + "|" + part.getReader().readLine());
                break;
            default:
                response.setStatusCode(404);
        }
    }

    /** Reads a file by a relative name, in both of Java's ways. */
    private static void data(HttpResponse response) throws IOException {
        try (BufferedReader reader = new BufferedReader(new FileReader("data.txt", StandardCharsets.UTF_8))) {
            String text = reader.readLine();
            if (text.equals(Files.readString(Path.of("data.txt")))) {
                response.getWriter().write(text);
            }
        }
    }

    private static void describe(HttpRequest request, HttpResponse response) throws IOException {
        String body = request.getReader().lines().collect(Collectors.joining("\n"));
        String type = request.getContentType().orElse("");
        String form = "{}";
        if (type.equals("application/x-www-form-urlencoded")) {
            form = List.of(body.split("&")).stream().map(pair -> pair.split("=", 2))
                    .map(pair -> quoted(pair[0]) + ":" + quoted(URLDecoder.decode(pair[1], StandardCharsets.UTF_8)))
                    .collect(Collectors.joining(",", "{", "}"));
        }
        String parameters = request.getQueryParameters().entrySet().stream().map(Main::parameter).collect(Collectors.joining(",", "{", "}"));
        response.setStatusCode(201);
        response.setContentType("application/json; charset=utf-8");
        response.appendHeader("X-Answer", "yes");
        OutputStream out = response.getOutputStream();
        out.write(("{\"method\":" + quoted(request.getMethod()) + ",\"path\":" + quoted(request.getPath()) + ",\"args\":" + parameters
                + ",\"header\":" + quoted(request.getFirstHeader("x-test").orElse("")) + ",\"text\":" + quoted(body)
                + ",\"json\":" + (type.equals("application/json") ? body : "null") + ",\"form\":" + form + "}").getBytes(StandardCharsets.UTF_8));
    }

    private static String parameter(Map.Entry<String, List<String>> parameter) {
        return quoted(parameter.getKey()) + ":" + parameter.getValue().stream().map(Main::quoted).collect(Collectors.joining(",", "[", "]"));
    }

    private static String quoted(String text) {
        return '"' + text.replace("\\", "\\\\").replace("\"", "\\\"") + '"';
    }
}
