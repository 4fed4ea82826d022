package io.cloudevents;

import java.util.Set;

/** The attributes of an event that no specification names. */
public interface CloudEventExtensions {
    Object getExtension(String extensionName);

    Set<String> getExtensionNames();
}
