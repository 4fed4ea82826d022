package io.cloudevents;

import java.util.Set;

/** The version of the CloudEvents specification that an event follows. */
public enum SpecVersion {
    V03("0.3", Set.of("datacontenttype", "datacontentencoding", "schemaurl", "subject", "time")),
    V1("1.0", Set.of("datacontenttype", "dataschema", "subject", "time"));

    private final String version;
    private final Set<String> optional;

    SpecVersion(String version, Set<String> optional) {
        this.version = version;
        this.optional = optional;
    }

    @Override
    public String toString() {
        return version;
    }

    /** Returns the version of that number; IllegalArgumentException if there is none. */
    public static SpecVersion parse(String version) {
        for (SpecVersion each : values()) {
            if (each.version.equals(version)) {
                return each;
            }
        }
        throw new IllegalArgumentException("specversion " + version + " is not known");
    }

    /** Returns the names of the attributes that every event has. */
    public Set<String> getMandatoryAttributes() {
        return Set.of("specversion", "id", "type", "source");
    }

    /** Returns the names of the attributes that an event may have. */
    public Set<String> getOptionalAttributes() {
        return optional;
    }

    /** Returns the names of all attributes. */
    public Set<String> getAllAttributes() {
        Set<String> all = new java.util.HashSet<>(optional);
        all.addAll(getMandatoryAttributes());
        return all;
    }
}
