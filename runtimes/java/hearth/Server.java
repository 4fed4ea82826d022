package hearth;

import com.google.cloud.functions.CloudEventsFunction;
import com.google.cloud.functions.HttpFunction;
import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.net.InetSocketAddress;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.SynchronousQueue;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;

/** The HTTP server that calls one Function, with a thread for each request under way. */
final class Server {
    private static final int BACKLOG = 1024;

    private final HttpServer server;
    private final ExecutorService threads;

    /** @param prompt does, before a request, what nodeagent wants done first */
    Server(HttpFunction function, ClassLoader loader, InetSocketAddress address, Runnable prompt) throws IOException {
        threads = new ThreadPoolExecutor(1, Integer.MAX_VALUE, 1, TimeUnit.MINUTES, new SynchronousQueue<>(), work -> {
            Thread thread = new Thread(work, "hearth-request");
            thread.setDaemon(true);
            thread.setContextClassLoader(loader);
            return thread;
        }); // one stays, also over a freeze of more than that minute
        server = HttpServer.create(address, BACKLOG);
        server.setExecutor(threads);
        server.createContext("/", exchange -> {
            prompt.run();
            serve(exchange, function);
        });
        server.start();
    }

    InetSocketAddress address() {
        return server.getAddress();
    }

    private static void serve(HttpExchange exchange, HttpFunction function) throws IOException {
        Response response = new Response(exchange);
        try {
            function.service(new Request(exchange), response);
            response.finish();
        } catch (Throwable e) { // a request must not end what others are served by
            System.err.println("hearth: a request failed\n" + trace(e).stripTrailing());
            if (!response.replace(500, "Internal Server Error\n")) {
                throw new IOException("in the middle of an answer", e); // the server ends the connection
            }
        }
        exchange.close(); // not after that: it would end the answer as if it were whole
    }

    /** An HTTP function that calls one of CloudEvents. */
    static HttpFunction events(CloudEventsFunction function) {
        return (request, response) -> {
            response.setContentType("text/plain");
            if (!request.getMethod().equals("POST")) {
                response.setStatusCode(405);
                response.appendHeader("Allow", "POST");
                response.getWriter().write("a CloudEvent comes by POST\n");
                return;
            }
            Map<String, String> headers = new TreeMap<>();
            for (Map.Entry<String, List<String>> header : request.getHeaders().entrySet()) {
                headers.put(header.getKey().toLowerCase(Locale.ROOT), header.getValue().get(0));
            }
            Event event;
            try {
                event = Event.read(headers, request.getInputStream().readAllBytes());
            } catch (Event.Malformed e) {
                response.setStatusCode(400);
                response.getWriter().write(e.getMessage() + "\n");
                return;
            }
            function.accept(event);
            response.getWriter().write("OK");
        };
    }

    /** Returns when all that came is answered. */
    void drain() {
        threads.shutdown();
        try {
            threads.awaitTermination(Long.MAX_VALUE, TimeUnit.NANOSECONDS);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
        server.stop(0);
    }

    static String trace(Throwable e) {
        StringWriter text = new StringWriter();
        e.printStackTrace(new PrintWriter(text));
        return text.toString();
    }
}
