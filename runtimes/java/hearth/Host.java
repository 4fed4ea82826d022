package hearth;

import java.io.IOException;
import java.lang.reflect.Field;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.Random;
import java.util.TimeZone;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.atomic.AtomicLong;

/** The process as others see it: directory, environment, time zone, randomness. Java fixes them when it starts. */
final class Host {
    private Host() {}

    static {
        System.load("/opt/hearth/libloader.so");
    }

    private static native int changeDirectory(byte[] path);

    private static native int setVariable(byte[] name, byte[] value);

    private static native int detach();

    /** Takes the control socket away from descriptor 0 and from programs that the Function executes. */
    static void detachControl() throws IOException {
        check(detach(), "take the control socket away");
    }

    static void enter(String directory) throws IOException {
        check(changeDirectory(directory.getBytes(StandardCharsets.UTF_8)), "working directory " + directory);
    }

    /** Adds to the environment, of Java and of the libraries beside it, and reads the time zone anew. */
    static void addEnvironment(Map<String, String> added) throws IOException, ReflectiveOperationException {
        Field whole = Class.forName("java.lang.ProcessEnvironment").getDeclaredField("theUnmodifiableEnvironment");
        Field inner = Class.forName("java.util.Collections$UnmodifiableMap").getDeclaredField("m");
        whole.setAccessible(true);
        inner.setAccessible(true);
        @SuppressWarnings("unchecked")
        Map<String, String> environment = (Map<String, String>) inner.get(whole.get(null));
        environment.putAll(added); // which refuses names that cannot be
        for (Map.Entry<String, String> variable : added.entrySet()) {
            byte[] name = variable.getKey().getBytes(StandardCharsets.UTF_8);
            check(setVariable(name, variable.getValue().getBytes(StandardCharsets.UTF_8)), "environment variable " + variable.getKey());
        }
        System.clearProperty("user.timezone");
        TimeZone.setDefault(null);
    }

    /** Seeds the generators that are kept in memory. SecureRandom is the kernel's. */
    static void reseed(byte[] seed) throws ReflectiveOperationException {
        long value = seed.length < Long.BYTES ? 0 : ByteBuffer.wrap(seed).getLong();
        Math.random(); // so that its generator is there
        Field generator = Class.forName("java.lang.Math$RandomNumberGeneratorHolder").getDeclaredField("randomNumberGenerator");
        generator.setAccessible(true);
        ((Random) generator.get(null)).setSeed(value);
        Field seeder = ThreadLocalRandom.class.getDeclaredField("seeder");
        seeder.setAccessible(true);
        ((AtomicLong) seeder.get(null)).set(value);
        Field probe = Thread.class.getDeclaredField("threadLocalRandomProbe");
        probe.setAccessible(true);
        for (Thread thread : Thread.getAllStackTraces().keySet()) {
            probe.setInt(thread, 0); // it asks the seeder again
        }
    }

    private static void check(int error, String what) throws IOException {
        if (error != 0) {
            throw new IOException(what + ": error number " + error);
        }
    }
}
