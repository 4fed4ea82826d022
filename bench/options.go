package bench

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/bench/images"
)

// Options choose what a run does. New fills in defaults.
type Options struct {
	// Quick is for a run of less than two minutes: fewer rounds, the same cases.
	Quick bool
	// Rounds over all cases and systems; 0 is the suite's own number.
	Rounds int
	// Images, Encodings and Links choose the cases of pulls: all combinations of them. All empty is the suite's own choice.
	Images, Encodings, Links []string
	// Systems that are compared; empty is the suite's own choice.
	Systems []string
	// Faults are the cases of pull-faults; empty is all of them.
	Faults []string
	// Cases of handoff, as RUNTIME/DEGREE/N, of k8s-start, or of prefetch, as IMAGE/DISK; empty is the suite's own choice.
	Cases []string
	// Image is one of any registry, which is pulled beside Images, or alone.
	Image string
	// Function is the image that suites of starts deploy; empty is python, and go for handoff.
	Function string
	// Gateway is the URL of a cluster's gateway; empty finds one. Registry is where its nodes pull from, and this machine can push to.
	Gateway, Registry string
	// Cluster makes a Kubernetes cluster when $KUBECONFIG names none, and says where its kubeconfig and its registry are.
	Cluster func(ctx context.Context, progress func(line string)) (kubeconfig, registry string, end func() error, err error)
	// Cache holds images and tools (see images.Config); Tools and Bin hold the programs of others and Hearth's own.
	Cache, Tools, Bin string
	// Progress hears one line for each thing that takes time.
	Progress io.Writer
}

// say writes a line of progress.
func (o *Options) say(format string, args ...any) {
	fmt.Fprintf(o.Progress, "%s  %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}

// rounds that a suite makes.
func (o *Options) rounds(quick, full int) int {
	switch {
	case o.Rounds > 0:
		return o.Rounds
	case o.Quick:
		return quick
	}
	return full
}

// images says where sample images are built.
func (o *Options) images() images.Config {
	return images.Config{Cache: o.Cache, Progress: func(line string) { o.say("images: %s", line) }}
}

// layout of a sample image, built if the cache does not have it.
func (o *Options) layout(ctx context.Context, name string) (string, error) {
	return images.Build(ctx, o.images(), name)
}

// push uploads a sample image to a registry and returns its reference.
func (o *Options) push(ctx context.Context, registry, name string) (string, error) {
	layout, err := o.layout(ctx, name)
	if err != nil {
		return "", err
	}
	ref := registry + "/" + name + ":1"
	if _, err := images.Push(ctx, layout, ref); err != nil {
		return "", err
	}
	return ref, nil
}

// suites by name.
func suites() map[string]func(context.Context, *Options, *Report) error {
	return map[string]func(context.Context, *Options, *Report) error{
		"pull":        pullSuite,
		"pull-faults": faultSuite,
		"start":       startSuite,
		"handoff":     handoffSuite,
		"k8s-start":   kubernetesSuite,
		"prefetch":    prefetchSuite,
		"demo":        demoSuite,
	}
}

// Names of the suites.
func Names() []string { return slices.Sorted(maps.Keys(suites())) }

// Run runs a suite. The report holds what was measured until an error, if there is one.
func Run(ctx context.Context, suite string, o Options) (*Report, error) {
	run, ok := suites()[suite]
	if !ok {
		return nil, fmt.Errorf("there is no suite %q: choose one of %s", suite, strings.Join(Names(), ", "))
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("suite %s makes containers and file systems: run it as root", suite)
	}
	for _, dir := range []*string{&o.Cache, &o.Tools, &o.Bin} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return nil, fmt.Errorf("resolve %s: %w", *dir, err)
		}
		*dir = abs
	}
	if _, err := os.Stat(filepath.Join(o.Tools, "containerd")); err != nil {
		return nil, fmt.Errorf("no containerd in %s: run `make tools` first, or name another folder by --tools", o.Tools)
	}
	r := &Report{Suite: suite, Machine: ThisMachine()}
	return r, run(ctx, &o, r)
}
