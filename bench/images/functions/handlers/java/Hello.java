import com.google.cloud.functions.HttpFunction;
import com.google.cloud.functions.HttpRequest;
import com.google.cloud.functions.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.HexFormat;

/** The sample Function in Java: answers with a greeting and its digest. */
public final class Hello implements HttpFunction {
    @Override
    public void service(HttpRequest request, HttpResponse response) throws Exception {
        String name = request.getFirstQueryParameter("name").orElse("world").replaceAll("[^A-Za-z0-9 ]", "");
        byte[] digest = MessageDigest.getInstance("SHA-256").digest(name.getBytes(StandardCharsets.UTF_8));
        response.setContentType("application/json");
        response.getWriter().write("{\"hello\":\"" + name + "\",\"digest\":\"" + HexFormat.of().formatHex(digest) + "\"}\n");
    }
}
