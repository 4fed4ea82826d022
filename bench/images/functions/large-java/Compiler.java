import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.URL;
import java.net.URLClassLoader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import org.jetbrains.kotlin.cli.common.ExitCode;
import org.jetbrains.kotlin.cli.jvm.K2JVMCompiler;

/**
 * The compiler of Kotlin as a service, which has compiled and run a program before it listens, as one that is to be quick has to.
 * Of the samples' contract it keeps what a start takes; see package images.
 */
public final class Compiler {
    private static final String LIBRARY = "/usr/share/kotlin/kotlinc/lib/kotlin-stdlib.jar";
    private static final String PROGRAM = "fun answer() = (1..10).map { it * it }.filter { it % 2 == 1 }.joinToString(\",\")\n";

    public static void main(String[] arguments) throws Exception {
        String answer = compile();
        String text = System.getenv("PORT");
        int port = text == null || text.isEmpty() ? 8080 : Integer.parseInt(text);
        HttpServer server = HttpServer.create(new InetSocketAddress(port), 1024);
        server.createContext("/", exchange -> describe(exchange, answer));
        Runtime.getRuntime().addShutdownHook(new Thread(() -> Runtime.getRuntime().halt(0)));
        server.start();
        System.out.println("function: large-java listening on port " + port);
    }

    private static String compile() throws Exception {
        Path directory = Files.createTempDirectory("program");
        Path source = Files.writeString(directory.resolve("program.kt"), PROGRAM);
        ExitCode code = new K2JVMCompiler().exec(
                System.err, "-no-stdlib", "-no-reflect", "-cp", LIBRARY, "-d", directory.toString(), source.toString());
        if (code != ExitCode.OK) {
            throw new IllegalStateException("the compiler says " + code);
        }
        URL[] path = {directory.toUri().toURL(), Path.of(LIBRARY).toUri().toURL()};
        try (URLClassLoader loader = new URLClassLoader(path)) {
            return (String) loader.loadClass("ProgramKt").getMethod("answer").invoke(null);
        }
    }

    private static void describe(HttpExchange exchange, String answer) throws IOException {
        try (exchange) {
            if (!exchange.getRequestURI().getPath().equals("/")) {
                exchange.sendResponseHeaders(404, -1);
                return;
            }
            String version = System.getProperty("java.version");
            byte[] body = ("{\"runtime\":\"large-java\",\"version\":\"" + version + "\",\"answer\":\"" + answer + "\"}\n")
                    .getBytes(StandardCharsets.UTF_8);
            exchange.getResponseHeaders().set("Content-Type", "application/json");
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
        }
    }
}
