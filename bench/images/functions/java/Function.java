import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.URLDecoder;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

/** The sample function in Java. It follows the contract that every sample keeps; see package images. */
public final class Function {
    /** How long, in seconds, requests under way may take after SIGTERM. */
    private static final int GRACE = 10;

    private interface Route {
        void answer(HttpExchange exchange) throws IOException, InterruptedException;
    }

    private static final Map<String, Route> ROUTES = Map.of(
            "/", Function::describe,
            "/echo", Function::echo,
            "/sleep", Function::sleep,
            "/env", exchange -> text(exchange, 200, System.getenv().getOrDefault(query(exchange, "name"), "")),
            "/log", exchange -> {
                System.out.println(query(exchange, "line"));
                exchange.sendResponseHeaders(204, -1);
            });

    public static void main(String[] arguments) throws IOException {
        String text = System.getenv("PORT");
        int port = text == null || text.isEmpty() ? 8080 : Integer.parseInt(text);
        HttpServer server = HttpServer.create(new InetSocketAddress(port), 1024);
        ExecutorService threads = Executors.newCachedThreadPool();
        server.setExecutor(threads);
        server.createContext("/", Function::serve);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> stop(server, threads)));
        server.start();
        System.out.println("function: java listening on port " + port);
    }

    private static void serve(HttpExchange exchange) throws IOException {
        try (exchange) {
            Route route = ROUTES.get(exchange.getRequestURI().getPath());
            if (route == null) {
                exchange.sendResponseHeaders(404, -1);
                return;
            }
            route.answer(exchange);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }

    private static void describe(HttpExchange exchange) throws IOException {
        exchange.getResponseHeaders().set("Content-Type", "application/json");
        text(exchange, 200, "{\"runtime\":\"java\",\"version\":\"" + System.getProperty("java.version") + "\"}\n");
    }

    private static void echo(HttpExchange exchange) throws IOException {
        String kind = exchange.getRequestHeaders().getFirst("Content-Type");
        if (kind != null) {
            exchange.getResponseHeaders().set("Content-Type", kind);
        }
        String length = exchange.getRequestHeaders().getFirst("Content-Length");
        boolean chunked = exchange.getRequestHeaders().containsKey("Transfer-Encoding");
        long bytes = chunked ? 0 : length == null ? -1 : Long.parseLong(length);
        // In this server's words -1 is an empty body, and 0 one of unknown length.
        exchange.sendResponseHeaders(200, bytes == 0 && !chunked ? -1 : bytes);
        if (bytes > 0 || chunked) {
            exchange.getRequestBody().transferTo(exchange.getResponseBody());
        }
    }

    private static void sleep(HttpExchange exchange) throws IOException, InterruptedException {
        String ms = query(exchange, "ms");
        if (!ms.matches("[0-9]{1,9}")) {
            text(exchange, 400, "ms must be a number of milliseconds\n");
            return;
        }
        Thread.sleep(Long.parseLong(ms));
        text(exchange, 200, ms + "\n");
    }

    private static void text(HttpExchange exchange, int status, String body) throws IOException {
        byte[] bytes = body.getBytes(StandardCharsets.UTF_8);
        exchange.sendResponseHeaders(status, bytes.length == 0 ? -1 : bytes.length);
        exchange.getResponseBody().write(bytes);
    }

    /** Returns the first value of the named parameter of the query, or the empty string. */
    private static String query(HttpExchange exchange, String name) {
        String raw = exchange.getRequestURI().getRawQuery();
        for (String pair : raw == null ? new String[0] : raw.split("&")) {
            int equals = pair.indexOf('=');
            if (equals >= 0 && pair.substring(0, equals).equals(name)) {
                return URLDecoder.decode(pair.substring(equals + 1), StandardCharsets.UTF_8);
            }
        }
        return "";
    }

    /**
     * Lets requests under way end, and leaves with status 0: a JVM that a signal ends would report 143.
     * The server's own grace is of no use: in Java 17 it lasts to its end even when nothing is under way.
     */
    private static void stop(HttpServer server, ExecutorService threads) {
        threads.shutdown();
        try {
            threads.awaitTermination(GRACE, TimeUnit.SECONDS);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
        server.stop(0);
        System.out.flush();
        Runtime.getRuntime().halt(0);
    }
}
