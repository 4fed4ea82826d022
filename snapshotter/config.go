package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

// Registry brings images and the bytes of their layers. *registry.Client is one.
type Registry interface {
	Image(ctx context.Context, ref string, dgst digest.Digest) (*registry.Image, error)
	Open(ctx context.Context, ref string, l registry.Layer) (io.ReadCloser, error)
	Siblings(ctx context.Context, ref string, manifest digest.Digest) ([]registry.Sibling, error)
}

// Unpacker turns a layer's bytes into a tree, in one form or the other. *layer.Unpacker is one.
type Unpacker interface {
	Unpack(ctx context.Context, src io.Reader, spec layer.Spec, dir string) (*layer.Result, error)
	UnpackImage(ctx context.Context, src io.Reader, spec layer.Spec, file string) (*layer.Result, error)
}

// Profiles knows what starts of images read. *profiles.Sharer is one. What it knows is a hint: a pull never waits for it.
type Profiles interface {
	// Needed is asked beside the pull of an image, once its manifest is known: of which layers, by diffID, do starts read something? It
	// may ask others, until ctx ends.
	Needed(ctx context.Context, img *registry.Image) []digest.Digest
	// Unpacked is told when a pull has brought all layers of an image. trees are theirs, in the image's order; they are there for as long
	// as somebody uses the image.
	Unpacked(ctx context.Context, img *registry.Image, trees []string)
}

// Config says where a Snapshotter lives and what it works with. Root, Registry and Layers are required.
type Config struct {
	// Root is a directory of its own, on a file system that can be an overlay's upper directory. One process at a time.
	Root     string
	Registry Registry
	Layers   Unpacker
	// Form is how new layers are kept; default FormAuto.
	Form Form
	// Blobs keeps the compressed blobs as well; nil: they are nowhere, only their trees.
	Blobs Blobs
	// Profiles says what to bring first; nil: nobody knows.
	Profiles Profiles
	// MinFreePercent of the file system stay free: pulls are refused before, once the layers that nothing uses are dropped. Default 0:
	// until it is full.
	MinFreePercent float64
	// MaxBytes bounds the disk space of all layers, in the same way; default 0: no bound.
	MaxBytes int64
	// Parallel is how many layers are fetched and unpacked at the same time, the larger ones first; default 4.
	Parallel int
	// ResolveTimeout bounds reading an image's manifest and config; default 30 s.
	ResolveTimeout time.Duration
	// StallTimeout ends a job that has received no byte for so long; default 60 s.
	StallTimeout time.Duration
	// PrepareTimeout bounds every Prepare, since containerd's garbage collection waits behind it; default 15 min.
	PrepareTimeout time.Duration
	// SessionIdle is how long an image's layers are fetched on, and kept, though containerd asks for none of them; default 1 min.
	SessionIdle time.Duration
	Logger      *slog.Logger          // default: discard
	Registerer  prometheus.Registerer // nil: no metrics
}

// withDefaults checks the config and fills in what is not set.
func (c Config) withDefaults() (Config, error) {
	switch {
	case c.Root == "":
		return c, errors.New("snapshotter: no root directory")
	case c.Registry == nil || c.Layers == nil:
		return c, errors.New("snapshotter: registry and layers are required")
	case c.MinFreePercent < 0 || c.MinFreePercent >= 100 || c.MaxBytes < 0:
		return c, errors.New("snapshotter: --min-free is a percentage under 100, and --max-bytes must not be negative")
	case c.Parallel < 0 || c.ResolveTimeout < 0 || c.StallTimeout < 0 || c.PrepareTimeout < 0 || c.SessionIdle < 0:
		return c, errors.New("snapshotter: counts and timeouts must not be negative")
	}
	c.Form = cmp.Or(c.Form, FormAuto)
	if c.Form != FormAuto && c.Form != FormErofs && c.Form != FormDirectory {
		return c, fmt.Errorf("snapshotter: layers as %q: there are %s, %s and %s", c.Form, FormAuto, FormErofs, FormDirectory)
	}
	c.Parallel = cmp.Or(c.Parallel, 4)
	c.ResolveTimeout = cmp.Or(c.ResolveTimeout, 30*time.Second)
	c.StallTimeout = cmp.Or(c.StallTimeout, time.Minute)
	c.PrepareTimeout = cmp.Or(c.PrepareTimeout, 15*time.Minute)
	c.SessionIdle = cmp.Or(c.SessionIdle, time.Minute)
	c.Logger = cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
	return c, nil
}
