package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// files mounts a view of a committed snapshot and lists what is in it.
func files(t *testing.T, s snapshots.Snapshotter, name string) []string {
	t.Helper()
	key := fmt.Sprintf("view-%d", time.Now().UnixNano())
	mounts, err := s.View(t.Context(), key, name)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	if err := mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		return filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
			if rel, _ := filepath.Rel(dir, p); rel != "." {
				found = append(found, rel)
			}
			return err
		})
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	return found
}

func TestPull(t *testing.T) { inForms(t, testPull) }

func testPull(t *testing.T, form snapshotter.Form) {
	f := newFake()
	root := t.TempDir()
	s := start(t, f, as(form), func(c *snapshotter.Config) { c.Root = root })
	img := f.image("reg/a:1", "base", "lib", "app")
	top := pull{s: s, img: img}.all(t)
	if diff := cmp.Diff([]string{"app", "base", "lib"}, files(t, s, top)); diff != "" {
		t.Error(diff)
	}
	if f.resolved != 1 {
		t.Errorf("manifest was resolved %d times, want once", f.resolved)
	}
	info, err := s.Stat(t.Context(), top)
	if err != nil {
		t.Fatal(err)
	}
	if info.Kind != snapshots.KindCommitted || info.Labels[snapshots.LabelSnapshotRef] != (pull{img: img}).chain(2).String() {
		t.Errorf("top is %+v", info)
	}
	usage, err := s.Usage(t.Context(), top)
	if want := map[snapshotter.Form]int64{snapshotter.FormDirectory: 4096, snapshotter.FormErofs: 8192}[form]; err != nil || usage.Size != want || usage.Inodes != 2 {
		t.Errorf("usage %+v, error %v", usage, err)
	}
	phases, ok := s.Trace("reg/a:1")
	var names []string
	for _, p := range phases {
		names = append(names, p.Name)
		if p.Duration < 0 {
			t.Errorf("phase %s has duration %v", p.Name, p.Duration)
		}
	}
	slices.Sort(names)
	if diff := cmp.Diff([]string{"commit", "decompress", "fetch", "resolve", "sync", "unpack", "verify", "wait"}, names); !ok || diff != "" {
		t.Errorf("trace: %v %s", ok, diff)
	}
	if _, ok := s.Trace("reg/b:1"); ok {
		t.Error("trace of an image never pulled")
	}
	if left := append(list(t, root, "staging"), list(t, root, "trash")...); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// Two images in flight, which share a layer in different encodings: it is fetched once, and kept once.
func TestShareByDiffID(t *testing.T) {
	f := newFake()
	root := t.TempDir()
	s := start(t, f, func(c *snapshotter.Config) { c.Root = root })
	a, b := f.image("reg/a:1", "one", "shared"), f.image("reg/b:1", "two", "shared~2")
	f.block["shared"] = make(chan struct{})
	f.started = make(chan string, 8)
	results := make(chan error, 2)
	for _, img := range []*registry.Image{a, b} {
		go func() {
			p := pull{s: s, img: img}
			parent, _, err := p.prepare(t.Context(), 0, "")
			if err == nil {
				_, _, err = p.prepare(t.Context(), 1, parent)
			}
			results <- err
		}()
	}
	seen := map[string]bool{}
	for !seen["one"] || !seen["two"] || !seen["shared"] {
		seen[<-f.started] = true
	}
	close(f.block["shared"])
	for range 2 {
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	}
	if n := f.count("shared"); n != 1 {
		t.Errorf("shared layer was fetched %d times", n)
	}
	if n := len(list(t, root, "layers")); n != 3 {
		t.Errorf("%d trees on disk, want 3", n)
	}
	// A third image comes later, and the registry need not even be there.
	f.set(func() { f.fail["image"] = errors.New("down") })
	c := f.image("reg/c:1", "shared")
	if got := files(t, s, pull{s: s, img: c}.all(t)); !slices.Equal(got, []string{"shared"}) {
		t.Errorf("files %q", got)
	}
}

// An image that has a layer twice: one tree, which an overlay must not list twice.
func TestSameLayerTwice(t *testing.T) { inForms(t, testSameLayerTwice) }

func testSameLayerTwice(t *testing.T, form snapshotter.Form) {
	f := newFake()
	s := start(t, f, as(form))
	top := pull{s: s, img: f.image("reg/a:1", "same", "other", "same", "same")}.all(t)
	if got := files(t, s, top); !slices.Equal(got, []string{"other", "same"}) {
		t.Errorf("files %q", got)
	}
	mounts, err := s.Prepare(t.Context(), "container", top)
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(t.Context(), mounts, func(string) error { return nil }); err != nil {
		t.Error(err)
	}
}

func TestFailures(t *testing.T) {
	corruptErr := corrupt("bad")
	for name, c := range map[string]struct {
		where   string // the word, or "image"
		err     error
		reason  string // of the fallback, or
		is      error  // the error's kind
		mention string // what it names
	}{
		"registry down":          {where: "image", err: errors.New("connection refused"), reason: "resolve"},
		"no access":              {where: "image", err: fmt.Errorf("x: %w", registry.ErrUnauthorized), reason: "unauthorized"},
		"unknown image":          {where: "image", err: registry.ErrNotFound, reason: "not_found"},
		"fetch breaks":           {where: "bad", err: errors.New("connection reset"), reason: "fetch"},
		"corrupt":                {where: "bad", err: corruptErr, is: layer.ErrCorrupt, mention: digest.FromString("blob bad").String()},
		"corrupt and cut":        {where: "bad", err: errors.Join(corruptErr, errors.New("reset")), is: layer.ErrCorrupt},
		"truncated":              {where: "bad", err: fmt.Errorf("x: %w", registry.ErrSize), is: registry.ErrSize, mention: digest.FromString("blob bad").String()},
		"takes too much memory":  {where: "bad", err: fmt.Errorf("x: %w", layer.ErrTooLarge), reason: "memory"},
		"needs layers below":     {where: "bad", err: fmt.Errorf("x: %w", layer.ErrUnsupported), reason: "unsupported"},
		"disk full":              {where: "bad", err: &os.PathError{Op: "write", Path: "f", Err: unix.ENOSPC}, is: unix.ENOSPC, mention: "no space left"},
		"corrupt shows as error": {where: "bad", err: corruptErr, is: errdefs.ErrDataLoss},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			root, reg := t.TempDir(), prometheus.NewRegistry()
			s := start(t, f, func(c *snapshotter.Config) { c.Root, c.Registerer = root, reg })
			f.fail[c.where] = c.err
			p := pull{s: s, img: f.image("reg/a:1", "bad", "good")}
			key, mounts, err := p.prepare(t.Context(), 0, "")
			if c.reason == "" {
				if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.mention) || mounts != nil {
					t.Fatalf("mounts %v, error %v; want an error that is %v and names %q", mounts, err, c.is, c.mention)
				}
				if _, err := s.Stat(t.Context(), key); !errdefs.IsNotFound(err) {
					t.Errorf("stat of the refused snapshot: %v", err)
				}
			} else {
				if err != nil || len(mounts) != 1 || !slices.Contains(mounts[0].Options, "rw") {
					t.Fatalf("mounts %v, error %v; want writable mounts", mounts, err)
				}
				want := fmt.Sprintf("# HELP hearth_snapshotter_fallbacks_total Layers that were left to containerd, by reason.\n# TYPE hearth_snapshotter_fallbacks_total counter\nhearth_snapshotter_fallbacks_total{reason=%q} 1\n", c.reason)
				if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "hearth_snapshotter_fallbacks_total"); err != nil {
					t.Error(err)
				}
			}
			f.set(func() { delete(f.fail, c.where) })
			if c.where == "bad" { // the next pull tries again
				if _, mounts, err := p.prepare(t.Context(), 0, ""); err != nil || mounts != nil {
					t.Errorf("again: mounts %v, error %v", mounts, err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if left := list(t, root, "staging"); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// After a fallback containerd commits the layer itself; the layers above come remotely again, under its name.
func TestAboveFallback(t *testing.T) { inForms(t, testAboveFallback) }

func testAboveFallback(t *testing.T, form snapshotter.Form) {
	f := newFake()
	s := start(t, f, as(form))
	f.fail["base"] = errors.New("reset")
	p := pull{s: s, img: f.image("reg/a:1", "base", "app")}
	other := pull{s: s, img: f.image("reg/b:1", "base", "app")}
	key, mounts, err := p.prepare(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "base"), nil, 0o644)
	}); err != nil {
		t.Fatal(err)
	}
	name := "ns/77/" + p.chain(0).String()
	if err := s.Commit(t.Context(), name, key, snapshots.WithLabels(p.labels(0))); err != nil {
		t.Fatal(err)
	}
	first, mounts, err := p.prepare(t.Context(), 1, name)
	if err != nil || mounts != nil {
		t.Fatalf("mounts %v, error %v", mounts, err)
	}
	// Elsewhere the same chain has another parent: both are found.
	f.set(func() { delete(f.fail, "base") })
	second := other.all(t)
	if first == second {
		t.Fatal("one snapshot with two parents")
	}
	for _, top := range []string{first, second} {
		if got := files(t, s, top); !slices.Equal(got, []string{"app", "base"}) {
			t.Errorf("%s: files %q", top, got)
		}
	}
}

func TestPlain(t *testing.T) {
	for name, change := range map[string]func(map[string]string){
		"no reference":       func(l map[string]string) { delete(l, snapshots.LabelSnapshotRef) },
		"no image":           func(l map[string]string) { delete(l, "containerd.io/snapshot/cri.image-ref") },
		"bad digest":         func(l map[string]string) { l[snapshots.LabelSnapshotDiffID] = "sha256:../../etc" },
		"chain does not fit": func(l map[string]string) { l[snapshots.LabelSnapshotRef] = digest.FromString("x").String() },
		"not an image's part": func(l map[string]string) {
			l["containerd.io/snapshot/cri.layer-digest"] = digest.FromString("x").String()
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			s := start(t, f)
			labels := pull{s: s, img: f.image("reg/a:1", "base")}.labels(0)
			change(labels)
			mounts, err := s.Prepare(t.Context(), name, "", snapshots.WithLabels(labels))
			if err != nil || len(mounts) != 1 {
				t.Errorf("mounts %v, error %v; want ordinary mounts", mounts, err)
			}
		})
	}
}

// At the creation of a container containerd asks for missing layers without naming the image.
func TestLabelsWithoutImage(t *testing.T) {
	f := newFake()
	root := t.TempDir()
	s := start(t, f, func(c *snapshotter.Config) { c.Root = root })
	img := f.image("reg/a:1", "base", "app")
	p := pull{s: s, img: img}
	top := p.all(t)
	base, err := s.Stat(t.Context(), top)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{top, base.Parent} {
		if err := s.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := list(t, root, "layers"); len(left) > 0 {
		t.Fatalf("trees %q are left", left)
	}
	p.bare = true
	if got := files(t, s, p.all(t)); !slices.Equal(got, []string{"app", "base"}) {
		t.Errorf("files %q", got)
	}
}

// containerd before 2.3 sends no diffID.
func TestLabelsWithoutDiffID(t *testing.T) {
	f := newFake()
	s := start(t, f)
	p := pull{s: s, img: f.image("reg/a:1", "base")}
	labels := p.labels(0)
	delete(labels, snapshots.LabelSnapshotDiffID)
	if _, err := s.Prepare(t.Context(), "k", "", snapshots.WithLabels(labels)); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("error %v", err)
	}
	if got := files(t, s, p.chain(0).String()); !slices.Equal(got, []string{"base"}) {
		t.Errorf("files %q", got)
	}
}

func TestParallelIsBounded(t *testing.T) {
	f := newFake()
	s := start(t, f, func(c *snapshotter.Config) { c.Parallel = 2 })
	f.started = make(chan string, 8)
	block := make(chan struct{})
	words := []string{"a", "b", "c", "d", "e"}
	for _, w := range words {
		f.block[w] = block
	}
	p := pull{s: s, img: f.image("reg/a:1", words...)}
	done := make(chan error, 1)
	go func() {
		_, _, err := p.prepare(t.Context(), 0, "")
		done <- err
	}()
	<-f.started
	<-f.started
	close(block)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	f.set(func() {
		if f.most > 2 {
			t.Errorf("%d layers at once", f.most)
		}
	})
}

func TestClosed(t *testing.T) {
	f := newFake()
	root := t.TempDir()
	s := start(t, f, func(c *snapshotter.Config) { c.Root = root })
	f.block["base"] = make(chan struct{})
	f.started = make(chan string, 1)
	p := pull{s: s, img: f.image("reg/a:1", "base")}
	done := make(chan error, 1)
	go func() {
		_, _, err := p.prepare(context.WithoutCancel(t.Context()), 0, "")
		done <- err
	}()
	<-f.started
	if _, err := snapshotter.New(snapshotter.Config{Root: root, Registry: f, Layers: f}); err == nil {
		t.Fatal("two snapshotters on one root")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errdefs.IsUnavailable(err) {
		t.Errorf("prepare while closing: %v", err)
	}
	if left := list(t, root, "staging"); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
