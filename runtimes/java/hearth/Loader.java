package hearth;

import com.google.cloud.functions.CloudEventsFunction;
import com.google.cloud.functions.HttpFunction;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.net.HttpURLConnection;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.URL;
import java.net.URLClassLoader;
import java.nio.ByteBuffer;
import java.nio.channels.Channel;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.DirectoryStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Base64;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.locks.LockSupport;
import sun.misc.Signal;

/**
 * The loader of the java Runtime: boots Java and the classes that it is told, waits, loads one Function and serves it.
 * docs/RUNTIMES.md is the contract.
 */
public final class Loader {
    private static final int PROTOCOL = 1;
    private static final int MAX_LINE = 1 << 20;
    private static final int MAX_TRACE = 64 << 10;
    private static final int WARM_REQUESTS = 200;
    private static final String HOME = "/opt/hearth";

    /** What came over the control socket is not of the protocol. */
    private static final class Malformed extends Exception {
        private static final long serialVersionUID = 1;

        Malformed(String message) {
            super(message);
        }
    }

    private final List<Object> preloaded = new ArrayList<>();
    private final Map<String, Object> missing = new LinkedHashMap<>();
    private volatile Server server;
    private volatile Conversation conversation;
    private volatile SocketChannel loading; // the connection that asked for the Function that is being loaded

    public static void main(String[] arguments) throws Exception {
        Loader loader = new Loader();
        Signal.handle(new Signal("TERM"), signal -> loader.stop());
        boolean training = arguments.length > 0; // while the image is made: what is loaded now is archived
        ServerSocketChannel control = training ? null : takeControl();
        String preload = System.getenv("HEARTH_PRELOAD");
        loader.preload(preload == null ? "" : preload);
        try {
            warmUp();
        } catch (IOException | ReflectiveOperationException e) {
            log("not warmed up: " + e); // it serves as well, only later
            if (training) {
                throw e;
            }
        }
        if (!training) {
            Runtime.getRuntime().addShutdownHook(new Thread(loader::exiting));
            loader.run(control);
        }
    }

    private static ServerSocketChannel takeControl() throws IOException {
        Channel inherited = System.inheritedChannel(); // of a copy of descriptor 0
        if (!(inherited instanceof ServerSocketChannel control)) {
            throw new IOException("descriptor 0 is no listening socket");
        }
        control.configureBlocking(false);
        control.configureBlocking(true); // whatever it was made with
        Host.detachControl();
        return control;
    }

    private static void log(String message) {
        System.err.println("hearth: " + message);
    }

    private void preload(String names) {
        for (String each : names.split(",")) {
            String name = each.strip();
            if (name.isEmpty()) {
                continue;
            }
            try {
                Class.forName(name);
                preloaded.add(name);
            } catch (ClassNotFoundException | LinkageError e) {
                missing.put(name, e.toString());
            }
        }
    }

    /** Loads a Function and sends it requests through the whole server, so that a user's first one finds everything compiled. */
    private static void warmUp() throws IOException, ReflectiveOperationException {
        ClassLoader loader = classes(Path.of(HOME));
        HttpFunction function = importFunction(loader, "warm.Warm", "http");
        Server server = new Server(function, loader, new InetSocketAddress("127.0.0.1", 0), () -> { });
        URL url = URI.create("http://127.0.0.1:" + server.address().getPort() + "/warm?a=b").toURL();
        for (int i = 0; i < WARM_REQUESTS; i++) {
            HttpURLConnection request = (HttpURLConnection) url.openConnection();
            if (i % 2 > 0) {
                request.setDoOutput(true);
                request.getOutputStream().write('x');
            }
            request.getInputStream().readAllBytes();
        }
        server.drain();
        try {
            importFunction(loader, "warm.Missing", "http");
        } catch (ClassNotFoundException e) {
            failure(e);
        }
        Json.write(Json.parseOrNull("{\"load\":{\"env\":{\"a\":\"b\\n\"},\"n\":[1.5e3,true,null]}}"));
        Host.reseed(new byte[Long.BYTES]);
    }

    private void run(ServerSocketChannel control) throws IOException {
        while (true) {
            try (SocketChannel connection = control.accept()) {
                converse(connection);
            } catch (Malformed | IOException e) {
                log("control: " + e.getMessage());
            } finally {
                conversation = null;
            }
        }
    }

    private void converse(SocketChannel connection) throws IOException, Malformed {
        say(connection, "ready", Map.of(
                "protocol", PROTOCOL,
                "runtime", "java " + System.getProperty("java.version"),
                "loaded", server != null,
                "prompt", true,
                "preloaded", preloaded,
                "missing", missing));
        try (Selector selector = Selector.open()) {
            connection.configureBlocking(false);
            connection.register(selector, SelectionKey.OP_READ);
            Conversation begun = new Conversation(connection);
            conversation = begun;
            while (begun.takeIn()) {
                selector.select();
                selector.selectedKeys().clear();
            }
        }
    }

    /** Takes in what nodeagent has said before a request that has come; the request is not the worse for what that is. */
    private void prompt() {
        Conversation present = conversation;
        if (present == null) {
            return;
        }
        try {
            present.takeIn();
        } catch (Malformed | IOException e) {
            log("control: " + e.getMessage());
            try {
                present.connection.shutdownInput(); // the main thread finds its end
            } catch (IOException ignored) {
                // it has ended
            }
        }
    }

    /** One connection of nodeagent's. What has come is taken in by whoever is first: the thread that waits for it, or a request's. */
    private final class Conversation {
        final SocketChannel connection;
        private final ByteBuffer block = ByteBuffer.allocate(MAX_LINE / 16);
        private final ByteArrayOutputStream line = new ByteArrayOutputStream();

        Conversation(SocketChannel connection) {
            this.connection = connection;
        }

        /** Answers all that has come, one object a line; false if the connection has ended. */
        synchronized boolean takeIn() throws IOException, Malformed {
            int count;
            while ((count = connection.read(block.clear())) > 0) {
                block.flip();
                while (block.hasRemaining()) {
                    byte b = block.get();
                    if (b != '\n') {
                        line.write(b);
                        continue;
                    }
                    respond(connection, line.toString(StandardCharsets.UTF_8));
                    line.reset();
                }
                if (line.size() > MAX_LINE) {
                    throw new Malformed("a line of over 1 MiB");
                }
            }
            return count == 0;
        }
    }

    private void respond(SocketChannel connection, String line) throws IOException, Malformed {
        Map<?, ?> message;
        try {
            message = object(Json.parse(line), "what came");
        } catch (Json.Malformed e) {
            throw new Malformed(e.getMessage());
        }
        if (message.get("load") instanceof Map<?, ?> load && server == null) {
            loading = connection;
            try {
                say(connection, "loaded", Map.of("phases", load(load)));
                loading = null;
            } catch (Malformed | IOException e) {
                loading = null;
                throw e;
            } catch (Throwable e) { // the Function's own
                loading = null;
                say(connection, "failed", failure(e));
                Runtime.getRuntime().halt(1);
            }
        } else if (message.get("thawed") instanceof Map<?, ?> thawed) {
            try {
                Host.reseed(seed(thawed));
            } catch (ReflectiveOperationException e) {
                throw new IOException(e);
            }
            say(connection, "resumed", Map.of());
        } else {
            throw new Malformed("neither load, once, nor thawed");
        }
    }

    private static void say(SocketChannel connection, String what, Object value) throws IOException {
        ByteBuffer line = StandardCharsets.UTF_8.encode(Json.write(Map.of(what, value)) + "\n");
        while (line.hasRemaining()) {
            if (connection.write(line) == 0) { // nodeagent reads slowly
                LockSupport.parkNanos(1_000_000);
            }
        }
    }

    private static Map<?, ?> object(Object value, String what) throws Malformed {
        if (value instanceof Map<?, ?> map) {
            return map;
        }
        throw new Malformed(what + " is no object");
    }

    private static String text(Map<?, ?> message, String name, String otherwise) throws Malformed {
        Object value = message.get(name);
        if (value == null && otherwise != null) {
            return otherwise;
        }
        if (value instanceof String text) {
            return text;
        }
        throw new Malformed(name + " is no text");
    }

    private static byte[] seed(Map<?, ?> message) throws Malformed {
        try {
            return Base64.getDecoder().decode(text(message, "seed", ""));
        } catch (IllegalArgumentException e) {
            throw new Malformed("seed: " + e.getMessage());
        }
    }

    /** Loads the Function and returns the phases. What it throws but Malformed is the Function's failure. */
    private Map<String, Object> load(Map<?, ?> load) throws Throwable {
        String code = text(load, "code", null);
        String handler = text(load, "handler", "");
        String signature = text(load, "signature", "http");
        String address = text(load, "address", null);
        Map<String, String> environment = new LinkedHashMap<>();
        for (Map.Entry<?, ?> variable : object(load.containsKey("env") ? load.get("env") : Map.of(), "env").entrySet()) {
            environment.put((String) variable.getKey(), variable.getValue() instanceof String value ? value : text(Map.of(), "env", null));
        }
        byte[] seed = seed(load);
        Map<String, Object> phases = new LinkedHashMap<>();
        long begun = System.nanoTime();
        try {
            Host.addEnvironment(environment);
            Host.reseed(seed);
            Host.enter(code);
            ClassLoader loader = classes(Path.of(code));
            HttpFunction function = importFunction(loader, handler, signature);
            long imported = System.nanoTime();
            phases.put("import", (imported - begun) / 1e9);
            server = new Server(function, loader, resolved(address), this::prompt);
            phases.put("listen", (System.nanoTime() - imported) / 1e9);
        } catch (IOException e) {
            throw new IllegalStateException(e.getMessage(), e); // not the connection's
        }
        return phases;
    }

    private static InetSocketAddress resolved(String address) {
        int colon = address.lastIndexOf(':');
        return new InetSocketAddress(address.substring(0, Math.max(colon, 0)), Integer.parseInt(address.substring(colon + 1)));
    }

    /** The classes of a Function: those below its folder, and its jars there and in lib. */
    private static ClassLoader classes(Path code) throws IOException {
        List<URL> urls = new ArrayList<>();
        urls.add(code.toUri().toURL());
        for (Path folder : List.of(code, code.resolve("lib"))) {
            if (!Files.isDirectory(folder)) {
                continue;
            }
            try (DirectoryStream<Path> jars = Files.newDirectoryStream(folder, "*.jar")) {
                for (Path jar : jars) {
                    urls.add(jar.toUri().toURL());
                }
            }
        }
        return new URLClassLoader(urls.toArray(URL[]::new), Loader.class.getClassLoader());
    }

    private static HttpFunction importFunction(ClassLoader loader, String handler, String signature) throws ReflectiveOperationException {
        Thread.currentThread().setContextClassLoader(loader);
        Class<?> type = Class.forName(handler, true, loader);
        Class<?> wanted = switch (signature) {
            case "http" -> HttpFunction.class;
            case "cloudevent" -> CloudEventsFunction.class;
            default -> throw new IllegalArgumentException("signature \"" + signature + "\": want http or cloudevent");
        };
        if (!wanted.isAssignableFrom(type)) {
            throw new ClassCastException(handler + " does not implement " + wanted.getName() + ", which its signature " + signature + " wants");
        }
        Object function;
        try {
            function = type.getConstructor().newInstance();
        } catch (java.lang.reflect.InvocationTargetException e) {
            throw e.getCause() instanceof Error error ? error : new ExceptionInInitializerError(e.getCause());
        }
        return function instanceof HttpFunction http && signature.equals("http") ? http : Server.events((CloudEventsFunction) function);
    }

    private static Map<String, Object> failure(Throwable e) {
        Throwable told = e;
        while ((told instanceof ExceptionInInitializerError || told instanceof IllegalStateException) && told.getCause() != null) {
            told = told.getCause(); // what wraps it says nothing
        }
        String trace = Server.trace(e);
        String line = told.toString().lines().findFirst().orElse(told.getClass().getName());
        return Map.of("error", line, "trace", trace.substring(0, Math.min(trace.length(), MAX_TRACE)));
    }

    private void stop() {
        Server serving = server;
        if (serving != null) {
            serving.drain();
        }
        System.exit(0);
    }

    /** Tells of a Function that has ended the process while it was loaded. */
    private void exiting() {
        SocketChannel connection = loading;
        if (connection != null) {
            try {
                say(connection, "failed", failure(new IllegalStateException("System.exit was called while the Function was loaded")));
            } catch (IOException e) {
                log("control: " + e.getMessage());
            }
            Runtime.getRuntime().halt(1);
        }
    }
}
