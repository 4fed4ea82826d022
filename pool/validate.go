package pool

import (
	"errors"
	"fmt"
	"strings"
	"time"

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
)

// Validate says everything that is wrong with a Function, each with the field, the reason and an example.
func Validate(name string, spec *hearthv1.FunctionSpec) error {
	errs := []error{validName(name)}
	if spec == nil {
		return errors.Join(append(errs, errors.New(`spec: is missing; at least an image is needed, for example {"image":"registry.example/hello:1"}`))...)
	}
	errs = append(errs, validImage(spec.GetImage()))
	if p := spec.GetPort(); p < 0 || p > 65535 {
		errs = append(errs, fmt.Errorf("spec.port: %d is not between 1 and 65535; for example 8080, or leave it out for that", p))
	}
	errs = append(errs, validEnv(spec.GetEnv()), validArgs("command", spec.GetCommand()), validArgs("args", spec.GetArgs()), validHosts(spec.GetHosts()))
	errs = append(errs, validScaling(spec.GetScaling()))
	errs = append(errs, validDuration("timeout", spec.GetTimeout()))
	if r := spec.GetResources(); r.GetMemoryBytes() < 0 || r.GetCpuMillis() < 0 {
		errs = append(errs, fmt.Errorf("spec.resources: %d bytes and %d millis must not be negative; 0 is no limit", r.GetMemoryBytes(), r.GetCpuMillis()))
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

func validImage(image string) error {
	switch {
	case image == "":
		return errors.New("spec.image: is empty; for example \"registry.example/hello:1\"")
	case len(image) > 1024 || strings.ContainsFunc(image, func(c rune) bool { return c <= ' ' || c >= 0x7f }):
		return fmt.Errorf("spec.image: %.80q is no image reference; for example \"registry.example/hello:1\"", image)
	}
	return nil
}

func validEnv(env map[string]string) error {
	bytes := 0
	for name, value := range env {
		bytes += len(name) + len(value)
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return fmt.Errorf("spec.env: %q is no name of an environment variable with its value; for example LEVEL=info", name)
		}
	}
	if len(env) > maxList || bytes > maxSpecBytes {
		return fmt.Errorf("spec.env: %d variables with %d bytes are too many; at most %d with %d bytes", len(env), bytes, maxList, maxSpecBytes)
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
