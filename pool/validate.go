package pool

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	maxNameBytes   = 40
	maxInstances   = 10_000
	maxConcurrency = 100_000
	maxQueue       = 1_000_000
	maxDuration    = time.Hour
	maxList        = 1000
	maxSpecBytes   = 1 << 20
	maxSecretBytes = 64 << 10
	maxHandler     = 1024
	maxWarm        = 1000
)

// Validate says everything that is wrong with a Function, each with the field, the reason and an example.
func Validate(name string, spec *hearthv1.FunctionSpec) error {
	errs := []error{validName(name)}
	if spec == nil {
		return errors.Join(append(errs, errors.New(`spec: is missing; at least an image, or a runtime with code, is needed, for example {"image":"registry.example/hello:1"}`))...)
	}
	errs = append(errs, validGround(spec), validSecrets(spec.GetSecrets()))
	if p := spec.GetPort(); p < 0 || p > 65535 {
		errs = append(errs, fmt.Errorf("spec.port: %d is not between 1 and 65535; for example 8080, or leave it out for that", p))
	}
	errs = append(errs, validGroup(spec))
	errs = append(errs, validEnv("spec.env", spec.GetEnv()), validArgs("command", spec.GetCommand()), validArgs("args", spec.GetArgs()), validHosts(spec.GetHosts()))
	errs = append(errs, validScaling(spec.GetScaling()))
	errs = append(errs, validDuration("timeout", spec.GetTimeout()))
	if r := spec.GetResources(); r.GetMemoryBytes() < 0 || r.GetCpuMillis() < 0 {
		errs = append(errs, fmt.Errorf("spec.resources: %d bytes and %d millis must not be negative; 0 is no limit", r.GetMemoryBytes(), r.GetCpuMillis()))
	}
	return errors.Join(errs...)
}

// validGroup: Functions that share a pod have one network, in which each has a port of its own.
func validGroup(spec *hearthv1.FunctionSpec) error {
	var errs []error
	for field, name := range map[string]string{"tenant": spec.GetTenant(), "group": spec.GetGroup()} {
		if name != "" && (len(name) > maxNameBytes || !isLabel(name)) {
			errs = append(errs, fmt.Errorf("spec.%s: %.80q is no DNS label of at most %d bytes; for example \"acme\"", field, name, maxNameBytes))
		}
	}
	if spec.GetGroup() != "" && spec.GetPort() != 0 {
		errs = append(errs, fmt.Errorf("spec.port: %d cannot be had in a pod that group %q shares; leave it out, and have the process listen on $PORT", spec.GetPort(), spec.GetGroup()))
	}
	return errors.Join(errs...)
}

func validName(name string) error {
	switch {
	case name == "":
		return errors.New("name: is empty; for example \"hello\"")
	case len(name) > maxNameBytes:
		return fmt.Errorf("name: %d bytes are too many, at most %d; for example \"hello\"", len(name), maxNameBytes)
	case !isLabel(name):
		return fmt.Errorf("name: %q is no DNS label (a-z, 0-9 and -, with a letter or digit at both ends); for example \"hello-2\"", name)
	}
	return nil
}

func isLabel(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-'
}

// validGround: a Function is an image, or a Runtime with code for it.
func validGround(spec *hearthv1.FunctionSpec) error {
	name, code := spec.GetRuntime(), spec.GetCode()
	if name == "" && code == nil {
		return validImage("spec.image", spec.GetImage())
	}
	var errs []error
	if spec.GetImage() != "" {
		errs = append(errs, errors.New("spec.image: a function is an image, or a runtime with code, and not both; leave out one of them"))
	}
	if len(spec.GetCommand())+len(spec.GetArgs()) > 0 {
		errs = append(errs, errors.New("spec.command, spec.args: belong to an image; in a runtime the handler says what runs"))
	}
	if spec.GetWritableRoot() {
		errs = append(errs, errors.New("spec.writable_root: belongs to an image; in a runtime /tmp can be written to"))
	}
	if name == "" {
		errs = append(errs, errors.New("spec.runtime: is empty, and there is code; for example \"python\""))
	} else if len(name) > maxNameBytes || !isLabel(name) {
		errs = append(errs, fmt.Errorf("spec.runtime: %.80q is no name of a runtime; for example \"python\"", name))
	}
	return errors.Join(append(errs, validCode(code))...)
}

func validCode(code *hearthv1.Code) error {
	if code == nil {
		return errors.New(`spec.code: is missing, and there is a runtime; for example {"package":"registry.example/code/hello@sha256:…","handler":"main.hello"}`)
	}
	errs := []error{validImage("spec.code.package", code.GetPackage())}
	if p := code.GetPackage(); p != "" && !strings.Contains(p, "@sha256:") {
		// A tag may come to mean other code, and a Revision does not.
		errs = append(errs, fmt.Errorf("spec.code.package: %.80q is not by digest; `hearth deploy` pushes the code and names it so", p))
	}
	if h := code.GetHandler(); len(h) > maxHandler || strings.ContainsFunc(h, unicode.IsControl) {
		errs = append(errs, fmt.Errorf("spec.code.handler: %.80q is not at most %d printable bytes; for example \"main.hello\"", h, maxHandler))
	}
	if _, known := hearthv1.Signature_name[int32(code.GetSignature())]; !known {
		errs = append(errs, fmt.Errorf("spec.code.signature: %d is unknown; it is http or cloudevent", code.GetSignature()))
	}
	return errors.Join(errs...)
}

// validSecrets says nothing of what the secrets are.
func validSecrets(secrets map[string][]byte) error {
	bytes := 0
	for name, value := range secrets {
		bytes += len(name) + len(value)
		if !isFileName(name) {
			return fmt.Errorf("spec.secrets: %.80q is no file name of letters, digits, '.', '_' and '-'; for example \"api-key\"", name)
		}
	}
	if len(secrets) > maxList || bytes > maxSecretBytes {
		return fmt.Errorf("spec.secrets: %d secrets with %d bytes are too many; at most %d with %d bytes", len(secrets), bytes, maxList, maxSecretBytes)
	}
	return nil
}

func isFileName(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("._-", rune(c)) {
			return false
		}
	}
	return s != "" && s != "." && s != ".." && len(s) <= 253
}

// ValidateRuntime says everything that is wrong with a Runtime, as Validate does of a Function.
func ValidateRuntime(r *hearthv1.Runtime) error {
	errs := []error{validName(r.GetName()), validImage("image", r.GetImage()), validEnv("env", r.GetEnv())}
	bytes := 0
	for n, library := range r.GetPreload() {
		bytes += len(library)
		if library == "" || strings.ContainsRune(library, ',') || strings.ContainsFunc(library, unicode.IsControl) {
			errs = append(errs, fmt.Errorf("preload[%d]: %.80q is no library's name, which is printable and has no comma; for example \"numpy\"", n, library))
			break
		}
	}
	if len(r.GetPreload()) > maxList || bytes > maxSecretBytes {
		errs = append(errs, fmt.Errorf("preload: %d libraries with %d bytes are too many; at most %d with %d bytes", len(r.GetPreload()), bytes, maxList, maxSecretBytes))
	}
	if w := r.GetWarm(); w < 0 || w > maxWarm {
		errs = append(errs, fmt.Errorf("warm: %d is not between 0 and %d instances on each node; for example 2", w, maxWarm))
	}
	return errors.Join(errs...)
}

func validImage(field, image string) error {
	switch {
	case image == "":
		return fmt.Errorf("%s: is empty; for example \"registry.example/hello:1\"", field)
	case len(image) > 1024 || strings.ContainsFunc(image, func(c rune) bool { return c <= ' ' || c >= 0x7f }):
		return fmt.Errorf("%s: %.80q is no image reference; for example \"registry.example/hello:1\"", field, image)
	}
	return nil
}

func validEnv(field string, env map[string]string) error {
	bytes := 0
	for name, value := range env {
		bytes += len(name) + len(value)
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return fmt.Errorf("%s: %q is no name of an environment variable with its value; for example LEVEL=info", field, name)
		}
	}
	if len(env) > maxList || bytes > maxSpecBytes {
		return fmt.Errorf("%s: %d variables with %d bytes are too many; at most %d with %d bytes", field, len(env), bytes, maxList, maxSpecBytes)
	}
	return nil
}

func validArgs(field string, args []string) error {
	bytes := 0
	for n, arg := range args {
		bytes += len(arg)
		if strings.ContainsRune(arg, 0) {
			return fmt.Errorf("spec.%s[%d]: contains a zero byte, which no program can be given; for example [\"python\", \"app.py\"]", field, n)
		}
	}
	if len(args) > maxList || bytes > maxSpecBytes {
		return fmt.Errorf("spec.%s: %d words with %d bytes are too many; at most %d with %d bytes", field, len(args), bytes, maxList, maxSpecBytes)
	}
	return nil
}

func validHosts(hosts []string) error {
	if len(hosts) > maxList {
		return fmt.Errorf("spec.hosts: %d are too many; at most %d", len(hosts), maxList)
	}
	for n, host := range hosts {
		valid := len(host) <= 253
		for label := range strings.SplitSeq(host, ".") {
			valid = valid && isLabel(label)
		}
		if !valid {
			return fmt.Errorf("spec.hosts[%d]: %.80q is no host name in lower case and without a port; for example \"www.example.org\"", n, host)
		}
	}
	return nil
}

func validScaling(s *hearthv1.Scaling) error {
	var errs []error
	within := func(field string, n int32, most int32) {
		if n < 0 || n > most {
			errs = append(errs, fmt.Errorf("spec.scaling.%s: %d is not between 1 and %d; leave it out for the default", field, n, most))
		}
	}
	within("concurrency", s.GetConcurrency(), maxConcurrency)
	within("max", s.GetMax(), maxInstances)
	within("min", s.GetMin(), maxInstances)
	within("queue", s.GetQueue(), maxQueue)
	if s.GetFrozen() > maxInstances {
		errs = append(errs, fmt.Errorf("spec.scaling.frozen: %d is more than %d; leave it out for the default, or -1 for none", s.GetFrozen(), maxInstances))
	}
	if s.GetMax() > 0 && s.GetMin() > s.GetMax() {
		errs = append(errs, fmt.Errorf("spec.scaling.min: %d is more than max, which is %d; for example min 1 and max 10", s.GetMin(), s.GetMax()))
	}
	if s.GetMax() == 0 && s.GetMin() > defaultMax {
		errs = append(errs, fmt.Errorf("spec.scaling.min: %d is more than max, which is %d by default; set max too", s.GetMin(), defaultMax))
	}
	return errors.Join(append(errs, validDuration("scaling.window", s.GetWindow()), validDuration("scaling.grace", s.GetGrace()))...)
}

func validDuration(field string, d *durationpb.Duration) error {
	if d == nil {
		return nil
	}
	if d.CheckValid() != nil || d.AsDuration() < 0 || d.AsDuration() > maxDuration {
		return fmt.Errorf("spec.%s: %d s is not between 0 and %s; for example 60s", field, d.GetSeconds(), maxDuration)
	}
	return nil
}
