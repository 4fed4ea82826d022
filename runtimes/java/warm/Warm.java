package warm;

import com.google.cloud.functions.HttpFunction;
import com.google.cloud.functions.HttpRequest;
import com.google.cloud.functions.HttpResponse;

/** The Function that is loaded and called while the Runtime boots, so that a user's finds everything loaded and compiled. */
public final class Warm implements HttpFunction {
    @Override
    public void service(HttpRequest request, HttpResponse response) throws Exception {
        response.setContentType("text/plain");
        response.appendHeader("X-Warm", request.getFirstQueryParameter("a").orElse(""));
        response.getWriter().write(request.getPath() + request.getReader().readLine());
    }
}
