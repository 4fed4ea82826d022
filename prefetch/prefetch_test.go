package prefetch_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/prefetch"
)

const pages = 64

// mapped is a file of which this process has every eighth page in memory through a mapping.
func mapped(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "library.so")
	text := make([]byte, pages*os.Getpagesize())
	for i := range text {
		text[i] = byte(rand.Int())
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	area, err := unix.Mmap(int(f.Fd()), 0, len(text), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(area) })
	if err := unix.Madvise(area, unix.MADV_RANDOM); err != nil { // no page beside the one that is touched
		t.Fatal(err)
	}
	var sum byte
	for page := 0; page < pages; page += 8 {
		sum += area[page*os.Getpagesize()]
	}
	t.Logf("touched, sum %d", sum)
	return path
}

func TestObserve(t *testing.T) {
	path := mapped(t, t.TempDir())
	p, err := prefetch.Observe(uint32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range p.Files {
		if f.Path != path {
			continue
		}
		size, has := int64(os.Getpagesize()), map[int64]bool{}
		for _, r := range f.Ranges {
			for at := r.Offset; at < r.Offset+r.Length; at += size {
				has[at/size] = true
			}
		}
		for page := int64(0); page < pages; page += 8 {
			if !has[page] {
				t.Errorf("page %d was touched and is not in the profile: %v", page, f.Ranges)
			}
		}
		return
	}
	t.Errorf("%s is not in the profile", path)
}

// TestProfilesAreKept observes starts, and has another Prefetcher of the same folder read ahead.
func TestProfilesAreKept(t *testing.T) {
	image, root, tree := digest.FromString("image"), t.TempDir(), t.TempDir()
	f, err := prefetch.New(prefetch.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	mapped(t, tree)
	for range 5 {
		f.Started(image, uint32(os.Getpid()))
	}
	text, err := os.ReadFile(filepath.Join(root, image.Encoded()+".json"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := prefetch.ParseProfile(text)
	if err != nil || p.Starts != 3 {
		t.Errorf("%v, %v: want three starts and no more", p, err)
	}
	registry := prometheus.NewRegistry()
	again, err := prefetch.New(prefetch.Config{Root: root, Registerer: registry})
	if err != nil {
		t.Fatal(err)
	}
	top, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	again.ReadAhead(t.Context(), image, top)
	if asked(t, registry) == 0 {
		t.Error("nothing was read ahead")
	}
	before := asked(t, registry)
	again.ReadAhead(t.Context(), digest.FromString("unknown"), top)
	if err := os.WriteFile(filepath.Join(root, image.Encoded()+".json"), []byte("not a profile"), 0o600); err != nil {
		t.Fatal(err)
	}
	again.ReadAhead(t.Context(), image, top)
	if asked(t, registry) != before {
		t.Error("something was read ahead for an image that nothing is known of")
	}
}

// asked is how many bytes the metrics say were asked for.
func asked(t *testing.T, r *prometheus.Registry) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range families {
		if m.GetName() == "hearth_prefetch_bytes_total" {
			return m.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatal("no such metric")
	return 0
}

// TestReadAhead drops a file from memory and has it back before anyone reads it.
func TestReadAhead(t *testing.T) {
	image, root, tree := digest.FromString("image"), t.TempDir(), t.TempDir()
	size := int64(4 << 20)
	path := filepath.Join(tree, "lib.so")
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), int(size)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fsync(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, size, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	area, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(area) }()
	write(t, root, image, &prefetch.Profile{Version: 1, Starts: 1, Files: []prefetch.File{{Path: "/lib.so", Ranges: []prefetch.Range{{0, size}}}}})
	replay(t, root, tree, image, 0)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for resident(t, area) < int(size)/os.Getpagesize() {
		if ctx.Err() != nil {
			t.Fatalf("%d of %d pages are in memory", resident(t, area), int(size)/os.Getpagesize())
		}
		time.Sleep(time.Millisecond) // the disk is at it
	}
}

func resident(t *testing.T, area []byte) (n int) {
	t.Helper()
	present := make([]byte, len(area)/os.Getpagesize())
	if err := mincore(area, present); err != nil {
		t.Fatal(err)
	}
	for _, p := range present {
		n += int(p & 1)
	}
	return n
}

func write(t *testing.T, root string, image digest.Digest, p *prefetch.Profile) {
	t.Helper()
	text, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, image.Encoded()+".json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// replay reads ahead below tree and returns how much was asked for.
func replay(t *testing.T, root, tree string, image digest.Digest, budget int64) float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	f, err := prefetch.New(prefetch.Config{Root: root, Registerer: registry, Budget: budget})
	if err != nil {
		t.Fatal(err)
	}
	top, err := os.Open(tree)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	f.ReadAhead(t.Context(), image, top)
	return asked(t, registry)
}

// TestHostileTree reads ahead by a profile that names what is no file of the image.
func TestHostileTree(t *testing.T) {
	image, root, tree, outside := digest.FromString("image"), t.TempDir(), t.TempDir(), t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("s"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "short"), []byte("1234567890"), 0o600); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"absolute": secret, "climbs": "../../../../../../../.." + secret, "magic": "/proc/self/root" + secret} {
		if err := os.Symlink(to, filepath.Join(tree, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(tree, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &prefetch.Profile{Version: 1, Starts: 1}
	for _, name := range []string{"/absolute", "/climbs", "/magic", "/fifo", "/", "/gone", "/short"} {
		p.Files = append(p.Files, prefetch.File{Path: name, Ranges: []prefetch.Range{{0, 1 << 40}}})
	}
	write(t, root, image, p)
	if got := replay(t, root, tree, image, 0); got != 10 {
		t.Errorf("%v bytes were asked for, of the one file there are 10", got)
	}
	if got := replay(t, root, tree, image, 4); got != 4 {
		t.Errorf("%v bytes were asked for, the budget is 4", got)
	}
}
