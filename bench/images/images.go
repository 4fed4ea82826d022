// Package images builds the sample images that the demo, the benchmarks and the node tests start: real OCI images, made
// of Debian packages or of one static program, each with a small HTTP function in it. No container engine is needed;
// images are cached as OCI layouts, and pushed to a registry or exported for import into containerd.
//
// Every function keeps one contract. It listens on $PORT, 8080 if that is unset, prints one line once it does, and
// answers
//
//	GET /            JSON that tells at least its "runtime" and "version"
//	    /echo        the request's body and content type, streamed
//	    /sleep?ms=N  after N milliseconds
//	    /env?name=X  the environment variable X
//	    /log?line=L  204, once it has written L to standard output, which is all it ever writes there by itself
//
// On SIGTERM it takes no more connections, lets the requests under way end, and exits with status 0.
//
// Two keep only what a start takes of it, and are there to be started: flask, which is a small web service of Python's, and
// large-java, around the largest Java program that Debian packages, Kotlin's compiler, which has worked once before it listens.
//
// The images called runtime-NAME hold no function: they boot the Runtime of that name, with the loader of package runtimes.
package images

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// Config says where images are kept and who hears about progress.
type Config struct {
	// Cache is the folder of all of Hearth's caches; images are kept in its subfolder images. Overlay file systems are
	// mounted with upper folders below it, so it must not lie on an overlay itself.
	Cache string
	// Log receives details; nil discards them.
	Log *slog.Logger
	// Progress, if not nil, is called with one line for people when a slow step begins and when it has ended.
	Progress func(line string)
}

// Names returns the images there are. Those of the first line are what people run, the slowest to build first; those of the
// second have the shape that their name says, which is hard on who unpacks it, and are made of the first ones' files; those of
// the third are there to be started, and those of the fourth boot a Runtime and wait for a Function.
func Names() []string {
	return []string{
		"python", "java", "node", "go", "pause",
		"fat", "layers", "smallfiles", "torture",
		"flask", "large-java",
		"runtime-python", "runtime-java", "runtime-node", "runtime-native",
	}
}

// Build returns the path of the named image as an OCI image layout, and builds it first unless the cache has it. The
// image is rebuilt when its recipe, its sources or the builder have changed. Any number of processes may build at once:
// one works, the others wait for it. The images of Debian packages need root, mmdebstrap and a Debian mirror, which is
// the only thing asked over the network; the static ones need a Go toolchain.
//
// Whatever happens, also when ctx ends, no mount and no process is left behind.
func Build(ctx context.Context, cfg Config, name string) (layoutPath string, err error) {
	recipe, ok := recipeOf(name)
	if !ok {
		return "", fmt.Errorf("build image %q: no such image; there are %v", name, Names())
	}
	b, err := newBuilder(cfg)
	if err != nil {
		return "", fmt.Errorf("build image %s: %w", name, err)
	}
	layoutPath, err = b.image(ctx, name, recipe)
	if err != nil {
		return "", fmt.Errorf("build image %s: %w", name, err)
	}
	return layoutPath, nil
}

// builder holds what is common to the images of one Build call.
type builder struct {
	dir      string // <cache>/images, absolute
	log      *slog.Logger
	progress func(string)
}

func newBuilder(cfg Config) (*builder, error) {
	dir, err := filepath.Abs(filepath.Join(cfg.Cache, "images"))
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	b := &builder{dir: dir, log: cfg.Log, progress: cfg.Progress}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	if b.progress == nil {
		b.progress = func(string) {}
	}
	return b, nil
}

// image builds all layers of one image and joins them.
func (b *builder) image(ctx context.Context, name string, r recipe) (string, error) {
	return b.cached(ctx, name, r.key(), func(dir string) error {
		var layers []*blob
		var err error
		switch {
		case len(r.From) > 0:
			layers, err = b.shaped(ctx, name, r, dir)
		case len(r.Packages) > 0 || r.On != "":
			layers, err = b.debian(ctx, name, r, dir)
		default:
			layers, err = b.static(ctx, name, r, dir)
		}
		if err != nil {
			return err
		}
		return assemble(r.config(), layers, dir)
	})
}

// step runs one slow piece of work and tells when it begins and how long it took.
func (b *builder) step(image, what string, work func() error) error {
	start := time.Now()
	b.progress(fmt.Sprintf("%s: %s ...", image, what))
	if err := work(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	took := time.Since(start)
	b.progress(fmt.Sprintf("%s: %s: %.1f s", image, what, took.Seconds()))
	b.log.Debug("image step done", "image", image, "step", what, "duration", took)
	return nil
}
