import com.google.cloud.functions.CloudEventsFunction;
import io.cloudevents.CloudEvent;
import java.nio.charset.StandardCharsets;

/** A Function of CloudEvents. */
public final class Events implements CloudEventsFunction {
    @Override
    public void accept(CloudEvent event) {
        String data = event.getData() == null ? "" : new String(event.getData().toBytes(), StandardCharsets.UTF_8);
        System.out.println(String.join("|", "event", event.getId(), event.getType(), event.getSource().toString(), event.getSubject(), data));
        if (event.getExtension("fail") != null) {
            throw new IllegalStateException("the reason");
        }
    }
}
