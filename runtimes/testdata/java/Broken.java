/** Functions that cannot be loaded. */
public final class Broken {
    private Broken() {}

    /** Fails while the class is initialized. */
    public static final class Throws implements com.google.cloud.functions.HttpFunction {
        private static final int NUMBER = Integer.parseInt("the reason");

        @Override
        public void service(com.google.cloud.functions.HttpRequest request, com.google.cloud.functions.HttpResponse response) {
            response.setStatusCode(NUMBER);
        }
    }

    /** Fails while it is made. */
    public static final class Refuses implements com.google.cloud.functions.HttpFunction {
        /** Fails. */
        public Refuses() {
            throw new UnsupportedOperationException("the reason");
        }

        @Override
        public void service(com.google.cloud.functions.HttpRequest request, com.google.cloud.functions.HttpResponse response) {}
    }

    /** Ends the process. */
    public static final class Exits implements com.google.cloud.functions.HttpFunction {
        /** Ends it. */
        public Exits() {
            System.exit(3);
        }

        @Override
        public void service(com.google.cloud.functions.HttpRequest request, com.google.cloud.functions.HttpResponse response) {}
    }
}
