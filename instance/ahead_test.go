package instance_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/hearth-serverless/hearth/instance"
	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/prefetch/trace"
)

// reader counts what is asked of a Prefetcher, whose recordings it makes itself.
type reader struct {
	*prefetch.Prefetcher
	mu      sync.Mutex
	replays map[digest.Digest]int
	begun   []string // cgroup directories of recordings
	ended   []string // "ready" or "failed"
}

func newReader(t *testing.T) *reader {
	r := &reader{replays: map[digest.Digest]int{}}
	var err error
	if r.Prefetcher, err = prefetch.New(prefetch.Config{Root: t.TempDir(), Tracer: r.tracer()}); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *reader) Replay(_ context.Context, image prefetch.Image) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.replays[image.ChainID]++
}

// seen is how often an image of one layer was read ahead, where recordings began, and how those went that have ended.
func (r *reader) seen() (replays int, begun, ended []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.replays[oneLayer[0].DiffID], slices.Clone(r.begun), slices.Clone(r.ended)
}

type tracer struct{ r *reader }

func (r *reader) tracer() prefetch.Tracer { return tracer{r} }

func (t tracer) Begin(cgroups, _ []string) (prefetch.Recording, error) {
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	t.r.begun = append(t.r.begun, cgroups...)
	return &recording{r: t.r}, nil
}

type recording struct {
	r     *reader
	ready bool
}

func (r *recording) Ready() { r.ready = true }

func (r *recording) End() (trace.Trace, error) {
	r.r.mu.Lock()
	defer r.r.mu.Unlock()
	outcome := "failed"
	if r.ready {
		outcome = "ready"
	}
	r.r.ended = append(r.r.ended, outcome)
	return trace.Trace{}, nil
}

var oneLayer = []prefetch.Layer{{DiffID: digest.FromString("layer"), Dir: "/layer"}}

// withCgroup makes a fake Instance's cgroup.
func withCgroup(t *testing.T, f *fake, id string) string {
	t.Helper()
	dir := filepath.Dir(f.cgroupFile(id, "memory", "any"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestPrefetch prepares an image, which is read ahead then and before it is started, and has the start recorded.
func TestPrefetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, r := newFake(t), newReader(t)
		f.prefetch, f.layers = r, oneLayer
		e, stop := runUntil(t, f)
		defer stop()
		if _, err := prepare(e, 2); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if replays, begun, _ := r.seen(); replays != 1 || len(begun) > 0 {
			t.Errorf("prepared: %d replays, recorded in %v", replays, begun)
		}
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		dir := withCgroup(t, f, "a")
		if _, err := activate(e, "a", "c", 1, time.Minute); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if replays, begun, ended := r.seen(); replays != 2 || !slices.Contains(begun, dir) || len(ended) > 0 {
			t.Errorf("started: %d replays, recorded in %v, ended %v", replays, begun, ended)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if _, _, ended := r.seen(); !slices.Equal(ended, []string{"ready"}) {
			t.Errorf("recordings ended %v", ended)
		}
	})
}

// A start that fails ends its recording too, from which nothing is learnt.
func TestFailedStartIsNotLearnt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, r := newFake(t), newReader(t)
		f.prefetch, f.layers = r, oneLayer
		f.onLaunch = func(context.Context) error { return errors.New("no") }
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		withCgroup(t, f, "a")
		if _, err := activate(e, "a", "c", 1, time.Minute); err == nil {
			t.Fatal("started")
		}
		synctest.Wait()
		if _, _, ended := r.seen(); !slices.Equal(ended, []string{"failed"}) {
			t.Errorf("recordings ended %v", ended)
		}
		if _, ok := r.Profile(identity.ChainID([]digest.Digest{oneLayer[0].DiffID})); ok {
			t.Error("there is a profile")
		}
	})
}

func TestLayersOf(t *testing.T) {
	a, b, c := digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
	overlay := func(dirs string) []mount.Mount {
		return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"index=off", "lowerdir=" + dirs}}}
	}
	for name, c := range map[string]struct {
		mounts []mount.Mount
		ids    []digest.Digest
		want   []prefetch.Layer
	}{
		"several":               {overlay("/3:/2:/1"), []digest.Digest{a, b, c}, []prefetch.Layer{{DiffID: a, Dir: "/1"}, {DiffID: b, Dir: "/2"}, {DiffID: c, Dir: "/3"}}},
		"one, bound":            {[]mount.Mount{{Type: "bind", Source: "/1", Options: []string{"ro"}}}, []digest.Digest{a}, []prefetch.Layer{{DiffID: a, Dir: "/1"}}},
		"one, to be written to": {overlay("/1"), []digest.Digest{a}, []prefetch.Layer{{DiffID: a, Dir: "/1"}}},
		"one twice, kept once":  {overlay("/1:/2"), []digest.Digest{a, b, a}, []prefetch.Layer{{DiffID: b, Dir: "/2"}, {DiffID: a, Dir: "/1"}}},
		"one twice, kept twice": {overlay("/3:/2:/1"), []digest.Digest{a, b, a}, []prefetch.Layer{{DiffID: a, Dir: "/1"}, {DiffID: b, Dir: "/2"}, {DiffID: a, Dir: "/3"}}},
		"fewer than there are":  {overlay("/1"), []digest.Digest{a, b}, nil},
		"more than there are":   {overlay("/2:/1"), []digest.Digest{a}, nil},
		"relative":              {overlay("2"), []digest.Digest{a}, nil},
		"none":                  {nil, nil, nil},
	} {
		if diff := cmp.Diff(c.want, instance.LayersOf(c.mounts, c.ids)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}
