package instance

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/hearth-serverless/hearth/prefetch"
)

// Prefetcher learns what starts read, and reads it ahead of them; see package prefetch.
type Prefetcher interface {
	// Replay reads ahead what a start of an image will need. It may take a while.
	Replay(ctx context.Context, image prefetch.Image)
	// Begin records what a start reads in these cgroup directories, if that is worth while; otherwise it returns nil.
	Begin(image prefetch.Image, cgroups []string) *prefetch.Start
}

// recordAfter is for how long a start is recorded that is ready: what first requests read belongs to it.
const recordAfter = 2 * time.Second

// ahead has what starts need read ahead of them. It remembers where layers are, so that this need not wait for a snapshot.
type ahead struct {
	prefetch Prefetcher // or nil
	spawn    func(func(context.Context)) bool

	mu    sync.Mutex                  // guards known
	known map[string][]prefetch.Layer // by chain id
}

// learn notes where an image's layers are.
func (a *ahead) learn(chainID string, layers []prefetch.Layer) {
	if a.prefetch == nil || layers == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.known) >= maxKnownImages {
		clear(a.known)
	}
	a.known[chainID] = layers
}

// of is where an image's layers are, or were: of an image that has been removed, nothing is found there. It is nil if nobody knows.
func (a *ahead) of(chainID string) []prefetch.Layer {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.known[chainID]
}

// read has what starts of an image need read, beside whoever asks.
func (a *ahead) read(layers []prefetch.Layer) {
	if a.prefetch != nil && len(layers) > 0 {
		a.spawn(func(ctx context.Context) { a.prefetch.Replay(ctx, imageOf(layers)) })
	}
}

// imageOf is the image that consists of these layers.
func imageOf(layers []prefetch.Layer) prefetch.Image {
	diffIDs := make([]digest.Digest, len(layers))
	for i, l := range layers {
		diffIDs[i] = l.DiffID
	}
	return prefetch.Image{ChainID: identity.ChainID(diffIDs), Layers: layers}
}

// recordReads has what an Instance's start reads from these layers recorded. What it returns is to be called with how the start
// went.
func (e *Engine) recordReads(i *instance, layers []prefetch.Layer) (done func(error)) {
	nothing := func(error) {}
	if e.cfg.Prefetch == nil || len(layers) == 0 {
		return nothing
	}
	dirs, err := e.cgroups.directories(e.cgroups.function(i.place()))
	if err != nil || len(dirs) == 0 {
		e.log.Debug("start not recorded", "instance", i.id, "error", err)
		return nothing
	}
	recording := e.cfg.Prefetch.Begin(imageOf(layers), dirs)
	if recording == nil {
		return nothing
	}
	return func(err error) {
		if err == nil {
			recording.Ready()
		}
		ending := e.spawn(func(ctx context.Context) {
			if err == nil {
				sleep(ctx, recordAfter)
			}
			recording.End()
		})
		if !ending {
			recording.End()
		}
	}
}

// layersOf says where the layers are whose tree some mounts show, base first. It is nil if that cannot be told.
func layersOf(mounts []mount.Mount, diffIDs []digest.Digest) []prefetch.Layer {
	if checkMounts(mounts) != nil {
		return nil
	}
	dirs := []string{mounts[0].Source}
	if mounts[0].Type == "overlay" {
		dirs = nil
		for _, option := range mounts[0].Options {
			if list, ok := strings.CutPrefix(option, "lowerdir="); ok {
				dirs = strings.Split(list, ":")
			}
		}
	}
	above := slices.Clone(diffIDs)
	slices.Reverse(above) // as directories are
	if len(dirs) < len(above) {
		above = distinct(above) // the snapshotter has a layer once that an image has twice, at its upper place
	}
	if len(dirs) == 0 || len(dirs) != len(above) {
		return nil
	}
	layers := make([]prefetch.Layer, len(dirs))
	for n, dir := range dirs {
		if !filepath.IsAbs(dir) {
			return nil
		}
		layers[len(dirs)-1-n] = prefetch.Layer{DiffID: above[n], Dir: dir}
	}
	return layers
}

// distinct is a list without what has come before in it.
func distinct(list []digest.Digest) []digest.Digest {
	var out []digest.Digest
	for _, d := range list {
		if !slices.Contains(out, d) {
			out = append(out, d)
		}
	}
	return out
}
