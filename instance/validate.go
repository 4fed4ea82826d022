package instance

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// Bounds of what a Revision may bring: what execve takes, rounded down, and more than anyone needs.
const (
	maxEnvBytes  = 512 << 10
	maxArgsBytes = 128 << 10
	maxArgs      = 4096
	maxClaimID   = 128
	maxSnapshots = 64
	maxRevision  = 96 // a function's name and a number
)

// checkLabel accepts DNS labels of at most 63 characters. Names become parts of paths, host names and label values.
func checkLabel(what, name string) error {
	if len(name) > 63 || !isLabel(name) {
		return invalid("%s %q is not a DNS label of at most 63 characters", what, name)
	}
	return nil
}

func isLabel(s string) bool {
	for i, c := range []byte(s) {
		ok := c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' && i > 0 && i < len(s)-1
		if !ok {
			return false
		}
	}
	return s != ""
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// checkInstanceID leaves room for the suffix that the container's id gets: containerd takes 76 characters.
func checkInstanceID(id string) error { return checkLabel("instance id", id) }

func checkClaim(c *hearthv1.Claim) error {
	if c == nil {
		return invalid("claim is missing")
	}
	if c.Id == "" || len(c.Id) > maxClaimID || strings.ContainsFunc(c.Id, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return invalid("claim id %q is not 1 to %d printable characters", c.Id, maxClaimID)
	}
	if c.Epoch < 0 {
		return invalid("epoch %d is negative", c.Epoch)
	}
	if c.Deadline != nil && !c.Deadline.IsValid() {
		return invalid("deadline is not a time")
	}
	return nil
}

// checkRevision checks all of a Revision and returns its image's normalized reference.
func checkRevision(r *hearthv1.Revision) (image string, err error) {
	if r == nil {
		return "", invalid("revision is missing")
	}
	if err := checkLabel("function", r.Function); err != nil {
		return "", err
	}
	if len(r.Name) > maxRevision || !isLabel(r.Name) {
		return "", invalid("revision %q is not a DNS label of at most %d characters", r.Name, maxRevision)
	}
	if r.Port < 1 || r.Port > 65535 {
		return "", invalid("port %d is not between 1 and 65535", r.Port)
	}
	if r.Resources.GetMemoryBytes() < 0 || r.Resources.GetCpuMillis() < 0 {
		return "", invalid("resources are negative")
	}
	if err := checkEnv(r.Env); err != nil {
		return "", err
	}
	if err := checkArgs(slices.Concat(r.Command, r.Args)); err != nil {
		return "", err
	}
	return checkImage(r.Image)
}

func checkImage(ref string) (string, error) {
	if len(ref) > 1024 {
		return "", invalid("image reference of %d characters is too long", len(ref))
	}
	named, err := normalize(ref)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return named.String(), nil
}

func checkEnv(env map[string]string) error {
	size := 0
	for _, k := range slices.Sorted(maps.Keys(env)) {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.Contains(env[k], "\x00") {
			return invalid("environment variable %q", k)
		}
		size += len(k) + len(env[k]) + 2
	}
	if size > maxEnvBytes {
		return invalid("environment of %d bytes is larger than %d", size, maxEnvBytes)
	}
	return nil
}

func checkArgs(args []string) error {
	size := 0
	for _, a := range args {
		if strings.Contains(a, "\x00") {
			return invalid("argument %q", a)
		}
		size += len(a) + 1
	}
	if len(args) > maxArgs || size > maxArgsBytes {
		return invalid("%d arguments of %d bytes are too many", len(args), size)
	}
	return nil
}
