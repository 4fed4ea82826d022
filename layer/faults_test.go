package layer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
)

func none(string) bool { return false }

// someTar has small and large files, over a few blocks.
func someTar(t testing.TB) []byte {
	t.Helper()
	rnd := rand.New(rand.NewPCG(3, 4))
	ents := []ent{dir("d", 0o755), file("d/empty", "")}
	for i := range 150 {
		b := make([]byte, rnd.IntN(20000))
		for j := range b {
			b[j] = "abcdefgh"[rnd.IntN(8)]
		}
		ents = append(ents, file(fmt.Sprintf("d/f%d", i), string(b)))
		if i%50 == 0 {
			ents = append(ents, file(fmt.Sprintf("d/large%d", i), strings.Repeat(string(b), 100)), hard(fmt.Sprintf("d/hard%d", i), fmt.Sprintf("d/large%d", i)))
		}
	}
	return makeTar(t, ents...)
}

func TestFormats(t *testing.T) {
	tarball := someTar(t)
	want := t.TempDir()
	if _, err := unpackTar(t, tarball, want); err != nil {
		t.Fatal(err)
	}
	half := len(tarball)/2 + 77
	gz, zst, lz := compress(t, layer.Gzip, tarball), compress(t, layer.Zstd, tarball), compress(t, layer.LZ4, tarball)
	two := func(f layer.Format) []byte {
		return append(compress(t, f, tarball[:half]), compress(t, f, tarball[half:])...)
	}
	skippable := []byte{0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'a', 'b', 'c'}
	padded := append(bytes.Clone(tarball), make([]byte, 3<<20)...)
	tests := map[string]struct{ blob, tarball []byte }{
		"plain": {tarball, tarball}, "gzip": {gz, tarball}, "zstd": {zst, tarball}, "lz4": {lz, tarball},
		"gzip, two members": {two(layer.Gzip), tarball}, "zstd, two frames": {two(layer.Zstd), tarball}, "lz4, two frames": {two(layer.LZ4), tarball},
		"zstd after a skippable frame": {append(bytes.Clone(skippable), zst...), tarball},
		"lz4 after a skippable frame":  {append(bytes.Clone(skippable), lz...), tarball},
		"gzip with zeros behind":       {append(bytes.Clone(gz), make([]byte, 2<<20)...), tarball},
		"gzip with two bytes behind":   {append(bytes.Clone(gz), 1, 2), tarball},
		"padding after the tar":        {padded, padded}, "padding after the tar, gzip": {compress(t, layer.Gzip, padded), padded},
		"tar without an end": {tarball[:len(tarball)-1024], tarball[:len(tarball)-1024]},
		"junk after the tar": {append(bytes.Clone(tarball), "junk"...), append(bytes.Clone(tarball), "junk"...)},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			for i, src := range []io.Reader{bytes.NewReader(tt.blob), iotest.HalfReader(bytes.NewReader(tt.blob)), iotest.DataErrReader(bytes.NewReader(tt.blob))} {
				into := t.TempDir()
				res, err := newUnpacker(t, layer.Config{}).Unpack(t.Context(), src, specOf(tt.blob, tt.tarball), into)
				if err != nil {
					t.Fatal(err)
				}
				if !maps.Equal(describe(t, want, none), describe(t, into, none)) {
					t.Errorf("source %d: the tree differs from the plain tar's", i)
				}
				if res.CompressedBytes != int64(len(tt.blob)) {
					t.Errorf("compressed bytes: got %d, want %d", res.CompressedBytes, len(tt.blob))
				}
			}
		})
	}
	t.Run("sha512", func(t *testing.T) {
		for _, blob := range [][]byte{tarball, gz} {
			spec := specOf(blob, tarball)
			spec.DiffID = digest.SHA512.FromBytes(tarball)
			if _, err := newUnpacker(t, layer.Config{}).Unpack(t.Context(), bytes.NewReader(blob), spec, t.TempDir()); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestWrongBytes(t *testing.T) {
	tarball := someTar(t)
	other := digest.FromString("other")
	for _, format := range []layer.Format{layer.Tar, layer.Gzip, layer.Zstd, layer.LZ4} {
		blob := compress(t, format, tarball)
		flipped := bytes.Clone(blob)
		flipped[len(flipped)*2/3] ^= 0x10
		good := specOf(blob, tarball)
		edit := func(f func(*layer.Spec)) layer.Spec { s := good; f(&s); return s }
		tests := map[string]struct {
			blob []byte
			spec layer.Spec
			want []string
		}{
			"digest":              {blob, edit(func(s *layer.Spec) { s.Digest = other }), []string{"digest mismatch", good.Digest.String(), other.String()}},
			"diffID":              {blob, edit(func(s *layer.Spec) { s.DiffID = other }), []string{"diffID mismatch", good.DiffID.String(), other.String()}},
			"a bit":               {flipped, good, nil},
			"longer":              {append(bytes.Clone(blob), 0), good, []string{"longer"}},
			"much longer":         {append(bytes.Clone(blob), make([]byte, 4<<20)...), good, []string{"longer"}},
			"shorter":             {blob, edit(func(s *layer.Spec) { s.Size++ }), []string{fmt.Sprint(len(blob)), fmt.Sprint(len(blob) + 1)}},
			"empty":               {nil, good, []string{"empty"}},
			"empty, size unknown": {nil, edit(func(s *layer.Spec) { s.Size = 0 }), []string{"empty"}},
			"garbage":             {[]byte(strings.Repeat("garbage", 1000)), edit(func(s *layer.Spec) { s.Size = 7000 }), []string{"corrupt"}},
		}
		for name, tt := range tests {
			t.Run(format.String()+"/"+name, func(t *testing.T) {
				_, err := newUnpacker(t, layer.Config{}).Unpack(t.Context(), bytes.NewReader(tt.blob), tt.spec, shm(t))
				if !errors.Is(err, layer.ErrCorrupt) {
					t.Fatalf("got error %v, want a corrupt layer", err)
				}
				for _, w := range append(tt.want, tt.spec.Digest.String()) {
					if !strings.Contains(err.Error(), w) {
						t.Errorf("error %q does not say %q", err, w)
					}
				}
			})
		}
	}
}

// TestTruncation cuts blobs anywhere, and blobs that break at the source.
func TestTruncation(t *testing.T) {
	tarball := someTar(t)
	u := newUnpacker(t, layer.Config{})
	errBroken := errors.New("connection broken")
	for _, format := range []layer.Format{layer.Tar, layer.Gzip, layer.Zstd, layer.LZ4} {
		blob := compress(t, format, tarball)
		where := shm(t)
		for i := range 80 {
			cut := i
			if i >= 20 {
				cut = len(blob) * (i - 19) / 62
			}
			into := filepath.Join(where, fmt.Sprint(i))
			mkdirs(t, into)
			for _, size := range []int64{0, int64(len(blob))} {
				spec := specOf(blob, tarball)
				spec.Size = size
				if _, err := u.Unpack(t.Context(), bytes.NewReader(blob[:cut]), spec, empty(t, into)); !errors.Is(err, layer.ErrCorrupt) {
					t.Fatalf("%s cut at %d of %d: got error %v", format, cut, len(blob), err)
				}
			}
			src := io.MultiReader(bytes.NewReader(blob[:cut]), iotest.ErrReader(errBroken))
			_, err := u.Unpack(t.Context(), src, specOf(blob, tarball), empty(t, into))
			if !errors.Is(err, errBroken) || errors.Is(err, layer.ErrCorrupt) {
				t.Fatalf("%s, source broken at %d of %d: got error %v", format, cut, len(blob), err)
			}
			_ = os.RemoveAll(into)
		}
	}
}

func empty(t testing.TB, into string) string {
	t.Helper()
	if err := os.RemoveAll(into); err != nil {
		t.Fatal(err)
	}
	mkdirs(t, into)
	return into
}

func TestFullDisk(t *testing.T) {
	tarball := someTar(t)
	for _, format := range []layer.Format{layer.Tar, layer.Gzip} {
		where := t.TempDir()
		if err := unix.Mount("none", where, "tmpfs", 0, "size=1m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(where, unix.MNT_DETACH) })
		blob := compress(t, format, tarball)
		_, err := newUnpacker(t, layer.Config{}).Unpack(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), where)
		if !errors.Is(err, unix.ENOSPC) || errors.Is(err, layer.ErrCorrupt) {
			t.Fatalf("got error %v, want ENOSPC", err)
		}
	}
}

// cancelAt cancels once n bytes were read.
type cancelAt struct {
	src    io.Reader
	n      int
	cancel func()
}

func (c *cancelAt) Read(p []byte) (int, error) {
	n, err := c.src.Read(p[:min(len(p), 7777)])
	if c.n -= n; c.n <= 0 {
		c.cancel()
	}
	return n, err
}

// TestCancellationLeavesNothing cancels at random bytes. A goroutine that is left over fails the test as a deadlock of its bubble, and
// a block that is not given back stops the layers after it.
func TestCancellationLeavesNothing(t *testing.T) {
	tarball := someTar(t)
	blob := compress(t, layer.Gzip, tarball)
	where := shm(t)
	synctest.Test(t, func(t *testing.T) {
		u := newUnpacker(t, layer.Config{MemoryBytes: 4 << 20})
		unpack := func(ctx context.Context, src io.Reader, data []byte, into string) error {
			_, err := u.Unpack(ctx, src, specOf(data, tarball), empty(t, filepath.Join(where, into)))
			return err
		}
		if err := unpack(t.Context(), bytes.NewReader(blob), blob, "first"); err != nil { // what the runtime opens once is open now
			t.Fatal(err)
		}
		fds := openFiles(t)
		rnd := rand.New(rand.NewPCG(5, 6))
		for i := range 60 {
			data := blob
			if i%2 == 0 {
				data = tarball
			}
			ctx, cancel := context.WithCancel(t.Context())
			src := &cancelAt{bytes.NewReader(data), rnd.IntN(len(data)), cancel}
			if err := unpack(ctx, src, data, fmt.Sprint(i)); !errors.Is(err, context.Canceled) && err != nil {
				t.Fatalf("got error %v, want context.Canceled", err)
			}
			cancel()
		}
		if got := openFiles(t); got > fds {
			t.Errorf("open files: %d before, %d after", fds, got)
		}
		if err := unpack(t.Context(), bytes.NewReader(blob), blob, "last"); err != nil {
			t.Errorf("after all that: %v", err)
		}
	})
}

func openFiles(t testing.TB) int {
	t.Helper()
	ents, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(ents)
}

// TestManyLayersShareLittleMemory runs more layers at once than the budget admits.
func TestManyLayersShareLittleMemory(t *testing.T) {
	tarball := someTar(t)
	reg := prometheus.NewRegistry()
	u := newUnpacker(t, layer.Config{MemoryBytes: 16 << 20, Registerer: reg})
	where := shm(t)
	var g errgroup.Group
	for i := range 12 {
		blob := compress(t, layer.Format(i%4), tarball)
		into := filepath.Join(where, fmt.Sprint(i))
		mkdirs(t, into)
		g.Go(func() error {
			_, err := u.Unpack(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), into)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "hearth_layer_unpacks_total" && f.GetMetric()[0].GetCounter().GetValue() != 12 {
			t.Errorf("layers counted: %v", f)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []layer.Config{{MemoryBytes: 1}, {Writers: -1}, {Limits: layer.Limits{MaxRatio: -1}}, {MemoryBytes: -1}} {
		if _, err := layer.New(cfg); err == nil {
			t.Errorf("New(%+v) accepted it", cfg)
		}
	}
	blob := makeTar(t, file("a", "b"))
	spec := specOf(blob, blob)
	spec.DiffID = "sha256:nonsense"
	if _, err := newUnpacker(t, layer.Config{}).Unpack(t.Context(), bytes.NewReader(blob), spec, t.TempDir()); err == nil {
		t.Error("a malformed diffID was accepted")
	}
}
