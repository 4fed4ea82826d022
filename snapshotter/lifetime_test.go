package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// eventually waits for what another goroutine does, with an end.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain: " + what)
		}
	}
}

// A pull that is given up: its Prepare returns at once, its jobs run on for a while, then they are cancelled and leave nothing.
func TestGivenUp(t *testing.T) {
	needRoot(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		root := t.TempDir()
		s := start(t, f, func(c *snapshotter.Config) { c.Root = root })
		f.block["slow"] = make(chan struct{})
		f.started = make(chan string, 2)
		p := pull{s: s, img: f.image("reg/a:1", "slow", "quick")}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, _, err := p.prepare(ctx, 0, "")
			done <- err
		}()
		<-f.started
		<-f.started
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatalf("error %v", err)
		}
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if n := len(list(t, root, "staging")); n != 1 {
			t.Errorf("%d layers are being made, want the slow one", n)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		for _, dir := range []string{"staging", "layers", "trash"} {
			if left := list(t, root, dir); len(left) > 0 {
				t.Errorf("%s: %q is left", dir, left)
			}
		}
		f.set(func() {
			if f.running > 0 {
				t.Errorf("%d layers are still being unpacked", f.running)
			}
			delete(f.block, "slow")
		})
		p.all(t)
	})
}

// One of two who wait for a layer goes; the other gets it.
func TestOneOfTwoGivesUp(t *testing.T) {
	needRoot(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		s := start(t, f)
		f.block["slow"] = make(chan struct{})
		a, b := pull{s: s, img: f.image("reg/a:1", "slow")}, pull{s: s, img: f.image("reg/b:1", "slow")}
		ctx, cancel := context.WithCancel(t.Context())
		results := make(chan error, 2)
		for _, c := range []struct {
			ctx context.Context
			p   pull
		}{{ctx, a}, {t.Context(), b}} {
			go func() {
				_, _, err := c.p.prepare(c.ctx, 0, "")
				results <- err
			}()
		}
		synctest.Wait()
		cancel()
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Fatalf("error %v", err)
		}
		time.Sleep(2 * time.Minute) // the first one's session ends
		close(f.block["slow"])
		if err := <-results; err != nil {
			t.Fatal(err)
		}
		if n := f.count("slow"); n != 1 {
			t.Errorf("fetched %d times", n)
		}
	})
}

// silent is a blob that never says anything.
type silent struct{ ctx context.Context }

func (s silent) Read([]byte) (int, error) { <-s.ctx.Done(); return 0, s.ctx.Err() }
func (s silent) Close() error             { return nil }

type silentRegistry struct{ *fake }

func (r silentRegistry) Open(ctx context.Context, _ string, _ registry.Layer) (io.ReadCloser, error) {
	return silent{ctx}, nil
}

// A registry that says nothing more, and one that takes too long in all: containerd is given the layer, in bounded time.
func TestDeadlines(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		change func(*snapshotter.Config)
		within time.Duration
	}{
		"stalled":  {func(*snapshotter.Config) {}, time.Minute},
		"deadline": {func(c *snapshotter.Config) { c.StallTimeout = time.Hour }, 15 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				s := start(t, f, func(c *snapshotter.Config) { c.Registry = silentRegistry{f} }, c.change)
				begun := time.Now()
				_, mounts, err := pull{s: s, img: f.image("reg/a:1", "base")}.prepare(t.Context(), 0, "")
				if err != nil || len(mounts) != 1 {
					t.Errorf("mounts %v, error %v; want ordinary mounts", mounts, err)
				}
				if took := time.Since(begun); took != c.within {
					t.Errorf("took %v, want %v", took, c.within)
				}
			})
		})
	}
}

// Trees live as long as a snapshot points to them, and removed snapshots go with Cleanup.
func TestCleanup(t *testing.T) { inForms(t, testCleanup) }

func testCleanup(t *testing.T, form snapshotter.Form) {
	f := newFake()
	root := t.TempDir()
	s := start(t, f, as(form), func(c *snapshotter.Config) { c.Root = root })
	a := pull{s: s, img: f.image("reg/a:1", "base", "app")}.all(t)
	b := pull{s: s, img: f.image("reg/b:1", "other", "base")}.all(t)
	remove := func(name string) {
		t.Helper()
		if err := errors.Join(s.Remove(t.Context(), name), s.Cleanup(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	info, err := s.Stat(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	remove(a)
	remove(info.Parent)
	if trees := list(t, root, "layers"); len(trees) != 2 {
		t.Errorf("trees %q, want base and other", trees)
	}
	if got := files(t, s, b); !slices.Equal(got, []string{"base", "other"}) {
		t.Errorf("files %q", got)
	}
	info, err = s.Stat(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	remove(b)
	remove(info.Parent)
	if left := mountsBelow(t, root); len(left) > 0 {
		t.Errorf("still mounted: %q", left)
	}
	for _, dir := range []string{"layers", "snapshots", "staging", "trash"} {
		if left := list(t, root, dir); len(left) > 0 {
			t.Errorf("%s: %q is left", dir, left)
		}
	}
}

// What is on the disk after a restart is what metadata says, and it is used.
func TestReopen(t *testing.T) { inForms(t, testReopen) }

func testReopen(t *testing.T, form snapshotter.Form) {
	f := newFake()
	root := t.TempDir()
	s := start(t, f, as(form), func(c *snapshotter.Config) { c.Root = root })
	p := pull{s: s, img: f.image("reg/a:1", "base", "app")}
	top := p.all(t)
	if _, err := s.Prepare(t.Context(), "container", top); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	unmountBelow(t, root) // as a boot does
	for _, dir := range []string{"staging/x/fs", "snapshots/4711/fs", "layers/sha256-unused/fs", "trash/y"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p.s = start(t, f, as(form), func(c *snapshotter.Config) { c.Root = root })
	if got := files(t, p.s, p.all(t)); !slices.Equal(got, []string{"app", "base"}) || f.count("base") != 1 {
		t.Errorf("files %q, base fetched %d times", got, f.count("base"))
	}
	if _, err := p.s.Mounts(t.Context(), "container"); err != nil {
		t.Error(err)
	}
	if n, m := len(list(t, root, "snapshots")), len(list(t, root, "layers")); n != 4 || m != 2 { // one is the view, not yet cleaned up
		t.Errorf("%d snapshots, %d trees", n, m)
	}
	eventually(t, "leftovers to go", func() bool { return len(list(t, root, "staging"))+len(list(t, root, "trash")) == 0 })
}

const (
	crashRoot = "HEARTH_TEST_CRASH_ROOT"
	crashForm = "HEARTH_TEST_CRASH_FORM"
)

// TestCrash kills a process that pulls, prepares, commits and removes, at any point, and looks at what the next one finds.
func TestCrash(t *testing.T) {
	if root := os.Getenv(crashRoot); root != "" {
		churn(t, root)
		return
	}
	inForms(t, testCrash)
}

func testCrash(t *testing.T, form snapshotter.Form) {
	root := t.TempDir()
	t.Cleanup(func() { unmountBelow(t, root) })
	for round := range 12 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrash$", "-test.timeout=60s")
		cmd.Env = append(os.Environ(), crashRoot+"="+root, crashForm+"="+string(form))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 6)); err != nil { // "ready\n"
			t.Fatalf("child: %v", err)
		}
		time.Sleep(time.Duration(3+17*round) * time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // killed
		checkInvariants(t, root)
	}
}

// churn uses a snapshotter until the process is killed.
func churn(t *testing.T, root string) {
	f := newFake()
	f.implicit["c"] = []string{"srv", "srv/d"}
	s, err := snapshotter.New(snapshotter.Config{Root: root, Registry: f, Layers: f, SessionIdle: time.Millisecond, Form: snapshotter.Form(os.Getenv(crashForm))})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("ready")
	for i := 0; ; i++ {
		p := pull{s: s, img: f.image(fmt.Sprintf("reg/%d", i), fmt.Sprint("a", i%3), fmt.Sprint("b", i%5), "c", fmt.Sprint("d", i%2))}
		var chain []string
		for l := range p.img.Layers {
			parent := ""
			if l > 0 {
				parent = chain[l-1]
			}
			name, mounts, err := p.prepare(t.Context(), l, parent)
			if err != nil || mounts != nil {
				t.Fatal(err, mounts)
			}
			chain = append(chain, name)
		}
		key := fmt.Sprint("container", time.Now().UnixNano())
		if _, err := s.Prepare(t.Context(), key, chain[3]); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			slices.Reverse(chain)
			for _, name := range append([]string{key}, chain...) {
				if err := s.Remove(t.Context(), name); err != nil && !strings.Contains(err.Error(), "child") {
					t.Fatal(err)
				}
			}
			if err := s.Cleanup(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// checkInvariants opens a root as the next process would: every snapshot has its directory and its tree, and nothing else is there.
func checkInvariants(t *testing.T, root string) {
	t.Helper()
	f := newFake()
	s, err := snapshotter.New(snapshotter.Config{Root: root, Registry: f, Layers: f})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	if err := s.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	}); err != nil && !strings.Contains(err.Error(), "bucket does not exist") {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil { // waits until what was left is deleted
		t.Fatal(err)
	}
	used := map[string]bool{}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer ms.Close()
	var ids map[string]string
	if err := ms.WithTransaction(t.Context(), false, func(ctx context.Context) (err error) {
		if len(names) > 0 {
			ids, err = storage.IDMap(ctx)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for id, name := range ids {
		fs := filepath.Join(root, "snapshots", id, "fs")
		if st, err := os.Stat(fs); err != nil || !st.IsDir() {
			t.Errorf("snapshot %s (%s): %v", id, name, err)
		}
		if to, err := os.Readlink(fs); err == nil {
			used[filepath.Base(filepath.Dir(to))] = true
		}
	}
	if n := len(list(t, root, "snapshots")); n != len(ids) {
		t.Errorf("%d snapshots in metadata, %d directories", len(ids), n)
	}
	for _, name := range list(t, root, "layers") {
		if !used[name] {
			t.Errorf("tree %s has no user", name)
		}
		if !exists(filepath.Join(root, "layers", name, "layer.json")) {
			t.Errorf("tree %s is not complete", name)
		}
		if n := len(list(t, root, filepath.Join("layers", name, "fs"))); n == 0 {
			t.Errorf("tree %s is empty", name)
		}
	}
	for _, at := range mountsBelow(t, root) {
		if filepath.Dir(filepath.Dir(filepath.Dir(at))) != root || filepath.Base(at) != "fs" {
			t.Errorf("%s is mounted", at)
		}
	}
	if left := append(list(t, root, "staging"), list(t, root, "trash")...); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

var _ snapshotter.Unpacker = (*layer.Unpacker)(nil)
var _ snapshotter.Registry = (*registry.Client)(nil)
