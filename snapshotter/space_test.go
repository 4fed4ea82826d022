package snapshotter_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// shop is a registry of real layers.
type shop struct {
	blobs  map[digest.Digest][]byte
	images map[string]*registry.Image
	half   func() // if not nil, called when half of a blob was read
}

func newShop() *shop {
	return &shop{blobs: map[digest.Digest][]byte{}, images: map[string]*registry.Image{}}
}

func (s *shop) Image(_ context.Context, ref string, _ digest.Digest) (*registry.Image, error) {
	return s.images[ref], nil
}

func (s *shop) Siblings(context.Context, string, digest.Digest) ([]registry.Sibling, error) {
	return nil, nil
}

func (s *shop) Open(_ context.Context, _ string, l registry.Layer) (io.ReadCloser, error) {
	blob := s.blobs[l.Digest]
	if s.half == nil {
		return io.NopCloser(bytes.NewReader(blob)), nil
	}
	return io.NopCloser(io.MultiReader(bytes.NewReader(blob[:len(blob)/2]), callReader(s.half), bytes.NewReader(blob[len(blob)/2:]))), nil
}

// callReader is an empty stream that calls a function when it is reached.
type callReader func()

func (c callReader) Read([]byte) (int, error) {
	c()
	return 0, io.EOF
}

// sell adds an image with a layer for each content: three files, of which the middle one is the content.
func (s *shop) sell(t *testing.T, ref string, contents ...[]byte) *registry.Image {
	t.Helper()
	img := &registry.Image{Ref: ref, Digest: digest.FromString(ref)}
	for i, content := range contents {
		var raw, blob bytes.Buffer
		w := tar.NewWriter(&raw)
		for _, f := range []struct {
			name string
			data []byte
		}{{"head", []byte(ref)}, {"body", content}, {"tail", []byte{byte(i)}}} {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s-%d", f.name, i), Mode: 0o644, Size: int64(len(f.data))}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(f.data); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewWriterLevel(&blob, gzip.BestSpeed)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := z.Write(raw.Bytes()); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		l := registry.Layer{Digest: digest.FromBytes(blob.Bytes()), DiffID: digest.FromBytes(raw.Bytes()), Size: int64(blob.Len())}
		s.blobs[l.Digest] = blob.Bytes()
		img.Layers = append(img.Layers, l)
	}
	s.images[ref] = img
	return img
}

// noise is content that does not compress, but repeated so often.
func noise(seed uint64, bytes, repeat int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	out := make([]byte, 0, bytes)
	for len(out) < bytes {
		var word [64]byte
		for i := range word {
			word[i] = byte(r.Uint32())
		}
		for range repeat {
			out = append(out, word[:]...)
		}
	}
	return out[:bytes]
}

// disk mounts a file system of a size and returns its root.
func disk(t *testing.T, kind string, megabytes int) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	root := filepath.Join(dir, "disk")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	switch kind {
	case "tmpfs":
		if err := unix.Mount("tmpfs", root, "tmpfs", 0, fmt.Sprintf("size=%dm", megabytes)); err != nil {
			t.Fatal(err)
		}
	case "ext4":
		image := filepath.Join(dir, "image")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, int64(megabytes)<<20); err != nil {
			t.Fatal(err)
		}
		command(t, "mkfs.ext4", "-q", "-F", "-m", "0", image)
		command(t, "mount", "-o", "loop", image, root)
	}
	t.Cleanup(func() { unmount(t, root) })
	return root
}

// unmount ends a mount of a test's own. The kernel lets go of files a moment after they were closed, the later the busier it is.
func unmount(t *testing.T, path string) {
	t.Helper()
	err := unix.Unmount(path, 0)
	for range 600 {
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(50 * time.Millisecond)
		err = unix.Unmount(path, 0)
	}
	if err != nil {
		t.Errorf("unmount %s: %v", path, err)
	}
}

func command(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v %s", args, err, out)
	}
}

// fill leaves so many bytes of a file system free; the returned function gives the rest back.
func fill(t *testing.T, root string, leave int64) (empty func()) {
	t.Helper()
	path := filepath.Join(root, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		t.Fatal(err)
	}
	size := max(4096, int64(st.Bavail)*st.Bsize-leave)
	for err = unix.ENOSPC; errors.Is(err, unix.ENOSPC) && size > 0; size -= 64 << 10 { // ext4 takes some blocks for itself
		err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func startReal(t *testing.T, s *shop, root string, change ...func(*snapshotter.Config)) *snapshotter.Snapshotter {
	t.Helper()
	unpacker, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return start(t, newFake(), append([]func(*snapshotter.Config){func(c *snapshotter.Config) {
		c.Root, c.Registry, c.Layers = filepath.Join(root, "hearth"), s, unpacker
	}}, change...)...)
}

// try pulls an image, which must not fall back: there is no space for that either.
func (p pull) try(t *testing.T) (top string, err error) {
	t.Helper()
	for i := range p.img.Layers {
		name, mounts, err := p.prepare(t.Context(), i, top)
		if err != nil {
			return "", err
		}
		if mounts != nil {
			t.Fatal("it fell back")
		}
		top = name
	}
	return top, nil
}

// A disk that is full at whatever byte: an error that names it, nothing left behind, and with room the pull succeeds.
func TestDiskFullAtAnyByte(t *testing.T) {
	s := newShop()
	img := s.sell(t, "reg/a:1", noise(1, 300_000, 1), noise(2, 900_000, 2), noise(3, 100_000, 1))
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for kind, rounds := range map[string]int{"tmpfs": 16, "ext4": 4} {
		full := 0
		for round := range rounds {
			root := disk(t, kind, 24)
			sn := startReal(t, s, root)
			leave := r.Int64N(1_500_000)
			if round == 0 { // chance may leave enough each time: all of it takes 1.3 MB
				leave = 200_000
			}
			empty := fill(t, root, leave)
			p := pull{s: sn, img: img}
			_, err := p.try(t)
			if err != nil {
				full++
				for _, want := range []string{filepath.Join(root, "hearth"), "remove images", "no space left"} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("%s, %d bytes left: error %v does not say %q", kind, leave, err, want)
					}
				}
				if !errdefs.IsResourceExhausted(err) {
					t.Errorf("%s, %d bytes left: error %v is of another kind", kind, leave, err)
				}
			}
			if left := list(t, filepath.Join(root, "hearth"), "staging"); len(left) > 0 && err != nil {
				t.Errorf("%s, %d bytes left: staging has %q", kind, leave, left)
			}
			empty()
			top, err := p.try(t)
			if err != nil {
				t.Fatalf("%s, %d bytes left, and then there was room: %v", kind, leave, err)
			}
			if got := files(t, sn, top); len(got) != 9 {
				t.Errorf("files %q", got)
			}
			if err := sn.Close(); err != nil {
				t.Error(err)
			}
		}
		if full == 0 {
			t.Errorf("%s was never full", kind)
		}
	}
}

// Before the disk is full layers that nothing uses go, and then pulls are refused.
func TestMinFree(t *testing.T) {
	s := newShop()
	a, b := s.sell(t, "reg/a:1", noise(1, 20<<20, 1)), s.sell(t, "reg/b:1", noise(2, 12<<20, 1))
	root := disk(t, "tmpfs", 64)
	sn := startReal(t, s, root, func(c *snapshotter.Config) { c.MinFreePercent = 30 })
	top, err := pull{s: sn, img: a}.try(t)
	if err != nil {
		t.Fatal(err)
	}
	_, err = pull{s: sn, img: b}.try(t) // 44 MiB are free, of which 19 are to stay, and it may need 24
	if err != nil {
		t.Fatalf("there was room: %v", err)
	}
	c := s.sell(t, "reg/c:1", noise(3, 10<<20, 1))
	if _, err = (pull{s: sn, img: c}).try(t); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "--min-free") || !strings.Contains(err.Error(), root) {
		t.Fatalf("error %v", err)
	}
	if err := sn.Remove(t.Context(), top); err != nil { // containerd's Cleanup is still to come
		t.Fatal(err)
	}
	if _, err := (pull{s: sn, img: c}).try(t); err != nil {
		t.Errorf("the layer that nothing uses is in the way: %v", err)
	}
}

// A pull that began in time stops when others fill the disk.
func TestMinFreeInTheMiddle(t *testing.T) {
	s := newShop()
	img := s.sell(t, "reg/a:1", noise(1, 10<<20, 1))
	root := disk(t, "tmpfs", 64)
	sn := startReal(t, s, root, func(c *snapshotter.Config) { c.MinFreePercent = 40 })
	var empty func()
	s.half = func() { empty = fill(t, root, 10<<20) }
	_, err := pull{s: sn, img: img}.try(t)
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "--min-free") {
		t.Errorf("error %v", err)
	}
	empty()
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		t.Fatal(err)
	}
	if left := list(t, filepath.Join(root, "hearth"), "staging"); len(left) > 0 || st.Bavail*10 < st.Blocks*9 {
		t.Errorf("left: %q, %d of %d blocks free", left, st.Bavail, st.Blocks)
	}
}

func TestQuota(t *testing.T) {
	f := newFake() // each of its layers takes 4096 bytes as a directory
	s := start(t, f, func(c *snapshotter.Config) { c.MaxBytes, c.Form = 10_000, snapshotter.FormDirectory })
	var tops []string
	for _, word := range []string{"one", "two"} {
		tops = append(tops, pull{s: s, img: f.image("reg/"+word+":1", word)}.all(t))
	}
	third := pull{s: s, img: f.image("reg/three:1", "three")}
	if _, err := third.try(t); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "--max-bytes") {
		t.Errorf("error %v", err)
	}
	if err := s.Remove(t.Context(), tops[0]); err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	third.all(t)
	usage, err := s.Usage(t.Context(), tops[1])
	if err != nil || usage != (snapshots.Usage{Size: 4096, Inodes: 2}) {
		t.Errorf("usage %+v %v", usage, err)
	}
	if _, err := snapshotter.New(snapshotter.Config{Root: t.TempDir(), Registry: f, Layers: f, MinFreePercent: 100}); err == nil {
		t.Error("takes a percentage of 100")
	}
}
