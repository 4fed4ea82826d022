package instance

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

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
	maxHandler   = 1024
	maxPreload   = 256

	maxSecrets      = 256
	maxSecretName   = 253
	maxSecretsBytes = 256 << 10
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

// checkGroup accepts no tenant, and no group.
func checkGroup(tenant, group string) error {
	var errs []error
	if tenant != "" {
		errs = append(errs, checkLabel("tenant", tenant))
	}
	if group != "" {
		errs = append(errs, checkLabel("group", group))
	}
	return errors.Join(errs...)
}

// checkWorker checks where a new Instance is to be: in a group's pod, or with neither.
func (e *Engine) checkWorker(r *hearthv1.CreateInstanceRequest) error {
	if r.Pod == "" {
		if r.Tenant != "" || r.Group != "" {
			return invalid("a tenant and a group are those of a pod, and none is named")
		}
		return nil
	}
	if r.Group == "" {
		return invalid("pod %.80q is named without the group that shares it", r.Pod)
	}
	return errors.Join(checkLabel("pod", r.Pod), checkGroup(r.Tenant, r.Group), e.mayShare(r.Group))
}

// mayShare refuses Functions of a group where Instances have sidecars: these listen on a port of their own, which only one of a pod
// can have.
func (e *Engine) mayShare(group string) error {
	if group != "" && e.cfg.Sidecar != "" {
		return invalid("functions of group %q share a pod, which cannot be with sidecars: run nodeagent with --sidecar none, or deploy without --merge", group)
	}
	return nil
}

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

// checkRevision checks all of a Revision and returns the normalized references of its image, or of its Runtime's image and its
// code package.
func checkRevision(r *hearthv1.Revision) (image, code string, err error) {
	if r == nil {
		return "", "", invalid("revision is missing")
	}
	if err := checkLabel("function", r.Function); err != nil {
		return "", "", err
	}
	if len(r.Name) > maxRevision || !isLabel(r.Name) {
		return "", "", invalid("revision %q is not a DNS label of at most %d characters", r.Name, maxRevision)
	}
	if err := checkGroup(r.Tenant, r.Group); err != nil {
		return "", "", err
	}
	if r.Port < 1 || r.Port > 65535 {
		return "", "", invalid("port %d is not between 1 and 65535", r.Port)
	}
	if r.Resources.GetMemoryBytes() < 0 || r.Resources.GetCpuMillis() < 0 {
		return "", "", invalid("resources are negative")
	}
	if err := errors.Join(checkEnv(r.Env), checkArgs(slices.Concat(r.Command, r.Args)), checkSecrets(r.Secrets)); err != nil {
		return "", "", err
	}
	if r.Runtime == nil && r.Code == nil {
		image, err = checkImage(r.Image)
		return image, "", err
	}
	return checkCode(r)
}

// checkForgotten returns what a Revision brought to the node for itself: its code, or its image. Its Runtime may be gone by then, and is
// not the Revision's anyway.
func checkForgotten(r *hearthv1.Revision) (ref string, err error) {
	if len(r.GetName()) > maxRevision || !isLabel(r.GetName()) {
		return "", invalid("revision %q is not a DNS label of at most %d characters", r.GetName(), maxRevision)
	}
	if r.GetCode() != nil {
		return checkImage(r.Code.Package)
	}
	return checkImage(r.Image)
}

// checkCode checks a Revision of a Runtime.
func checkCode(r *hearthv1.Revision) (image, code string, err error) {
	if r.Runtime == nil || r.Code == nil || r.Image != "" || len(r.Command)+len(r.Args) > 0 || r.WritableRoot {
		return "", "", invalid("a runtime and code go together, and with neither image nor command nor args nor a writable root")
	}
	rt, err := checkRuntime(r.Runtime)
	if err != nil {
		return "", "", err
	}
	if len(r.Code.Handler) > maxHandler || strings.ContainsFunc(r.Code.Handler, unicode.IsControl) {
		return "", "", invalid("handler is longer than %d bytes or has control characters", maxHandler)
	}
	if hearthv1.Signature_name[int32(r.Code.Signature)] == "" {
		return "", "", invalid("signature %d is unknown", r.Code.Signature)
	}
	code, err = checkImage(r.Code.Package)
	return rt.Image, code, err
}

// checkDegree returns the Runtime to boot, checked; nil for a sandbox.
func checkDegree(degree hearthv1.Degree, rt *hearthv1.Runtime) (*hearthv1.Runtime, error) {
	switch {
	case degree == hearthv1.Degree_DEGREE_RUNTIME:
		return checkRuntime(rt)
	case degree != hearthv1.Degree_DEGREE_UNSPECIFIED && degree != hearthv1.Degree_DEGREE_SANDBOX:
		return nil, invalid("degree %s: instances are made as sandbox or runtime", degree)
	case rt != nil:
		return nil, invalid("a runtime is booted with degree runtime only")
	}
	return nil, nil
}

// checkRuntime returns a Runtime with its image's normalized reference.
func checkRuntime(rt *hearthv1.Runtime) (*hearthv1.Runtime, error) {
	if rt == nil {
		return nil, invalid("runtime is missing")
	}
	if err := errors.Join(checkLabel("runtime", rt.Name), checkEnv(rt.Env)); err != nil {
		return nil, err
	}
	if rt.Generation < 0 {
		return nil, invalid("generation %d of runtime %s is negative", rt.Generation, rt.Name)
	}
	if len(rt.Preload) > maxPreload {
		return nil, invalid("%d libraries to preload are more than %d", len(rt.Preload), maxPreload)
	}
	for _, name := range rt.Preload {
		if name == "" || len(name) > maxHandler || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == ',' }) {
			return nil, invalid("library %.80q is not a name of at most %d printable characters without commas", name, maxHandler)
		}
	}
	image, err := checkImage(rt.Image)
	return runtimeOf(&hearthv1.Revision{Runtime: rt}, image), err
}

// runtimeOf is a Revision's Runtime with its image's normalized reference; nil if it has none.
func runtimeOf(r *hearthv1.Revision, image string) *hearthv1.Runtime {
	if r.GetRuntime() == nil {
		return nil
	}
	rt := proto.CloneOf(r.Runtime)
	rt.Image = image
	return rt
}

func isFileName(s string) bool {
	for _, c := range []byte(s) {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
		if !ok {
			return false
		}
	}
	return s != ""
}

// checkSecrets accepts names that are files of one directory and cannot lead out of it.
func checkSecrets(secrets map[string][]byte) error {
	size := 0
	for name, value := range secrets {
		if name == "." || name == ".." || len(name) > maxSecretName || !isFileName(name) {
			return invalid("secret %.80q is not a file's name of at most %d letters, digits, '.', '_' and '-'", name, maxSecretName)
		}
		size += len(value)
	}
	if len(secrets) > maxSecrets || size > maxSecretsBytes {
		return invalid("%d secrets of %d bytes are more than %d of %d", len(secrets), size, maxSecrets, maxSecretsBytes)
	}
	return nil
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
