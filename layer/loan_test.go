package layer_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/layer"
)

// windowed compresses data as one frame with a window of so many bytes.
func windowed(t testing.TB, data []byte, window int) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := zstd.NewWriter(&buf, zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	must(t, w.Close, w, data)
	return buf.Bytes()
}

// spy calls see at each read.
type spy struct {
	io.Reader
	see func()
}

func (s *spy) Read(p []byte) (int, error) {
	s.see()
	return s.Reader.Read(p)
}

// TestDecodersAreCounted unpacks more layers of wide windows at once than the memory is for, and looks at what is used all the time.
func TestDecodersAreCounted(t *testing.T) {
	const memory, window, layers = 40 << 20, 8 << 20, 10
	var lent, peak atomic.Int64
	u := newUnpacker(t, layer.Config{MemoryBytes: memory, Lent: func(bytes int64) {
		lent.Store(bytes)
		peak.Store(max(peak.Load(), bytes))
	}})
	see := func() {
		mapped, lent, most := u.Memory()
		if mapped+lent > most || most > memory {
			t.Errorf("%d bytes are mapped and %d lent, of %d", mapped, lent, most)
		}
	}
	tarball := someTar(t)
	where := shm(t)
	var g errgroup.Group
	for i := range layers {
		blob := windowed(t, tarball, window)
		if i%3 == 2 {
			blob = compress(t, layer.Gzip, tarball) // which borrows
		}
		into := filepath.Join(where, fmt.Sprint(i))
		mkdirs(t, into)
		g.Go(func() error {
			_, err := u.Unpack(t.Context(), &spy{bytes.NewReader(blob), see}, specOf(blob, tarball), into)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if peak.Load() < window {
		t.Errorf("%d bytes were lent at the most, for windows of %d", peak.Load(), window)
	}
	if mapped, still, _ := u.Memory(); mapped != 0 || still != 0 || lent.Load() != 0 {
		t.Errorf("%d bytes are still mapped, %d lent, %d told, and nothing goes on", mapped, still, lent.Load())
	}
}

// TestDecoderIsUsedAgain decodes many large frames of a layer with one decoder.
func TestDecoderIsUsedAgain(t *testing.T) {
	times := 0
	u := newUnpacker(t, layer.Config{Lent: func(int64) { times++ }})
	tarball := someTar(t)
	var blob []byte
	for rest := tarball; len(rest) > 0; {
		n := min(len(rest), 700<<10)
		blob = append(blob, windowed(t, rest[:n], 1<<20)...)
		rest = rest[n:]
	}
	if _, err := u.Decompress(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), io.Discard); err != nil {
		t.Fatal(err)
	}
	if times != 3 {
		t.Errorf("told of lent memory %d times, want 3: none, one decoder, none", times)
	}
}

// TestTooLargeWindow has frames that no memory is there for. The error comes before anything is allocated, and is not the bytes' fault.
func TestTooLargeWindow(t *testing.T) {
	tarball := someTar(t)
	head := func(descriptor byte, more ...byte) []byte {
		return append(append([]byte{0x28, 0xb5, 0x2f, 0xfd, descriptor}, more...), windowed(t, tarball, 1<<20)[6:]...)
	}
	huge := binary.LittleEndian.AppendUint64(nil, 1<<63+5)
	for name, blob := range map[string][]byte{
		"long": windowed(t, tarball, 128<<20), "widest that can be said": head(0, 0xff), "one segment of 2^63 bytes": head(0xe0, huge...),
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnpacker(t, layer.Config{Lent: func(bytes int64) {
				if bytes != 0 {
					t.Errorf("%d bytes are lent", bytes)
				}
			}})
			_, err := u.Unpack(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), t.TempDir())
			if !errors.Is(err, layer.ErrTooLarge) || errors.Is(err, layer.ErrCorrupt) {
				t.Errorf("got error %v, want that it is too large", err)
			}
		})
	}
	for _, window := range []int{32 << 20, 128 << 20} {
		blob := windowed(t, tarball, window)
		u := newUnpacker(t, layer.Config{MemoryBytes: map[int]int64{32 << 20: 48 << 20, 128 << 20: 256 << 20}[window]})
		if _, err := u.Decompress(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), io.Discard); err != nil {
			t.Errorf("a window of %d MiB: %v", window>>20, err)
		}
	}
}

// TestTinyFrames has files that lie in hundreds of blocks: each frame says that it may be half a mebibyte, and is a few bytes.
func TestTinyFrames(t *testing.T) {
	tarball := makeTar(t, file("small", string(mixed(3000))), dir("d", 0o755), file("d/next", string(mixed(9000))), file("last", "x"))
	var blob []byte
	for rest := tarball; len(rest) > 0; {
		blob = append(blob, 0x28, 0xb5, 0x2f, 0xfd, 0, 10<<3) // no size, a window of 1 MiB
		for block := range 4 {
			n := min(len(rest), 10)
			blob = append(blob, byte(n<<3|block/3), 0, 0) // not compressed
			blob = append(blob, rest[:n]...)
			rest = rest[n:]
		}
	}
	want := t.TempDir()
	if _, err := unpackTar(t, tarball, want); err != nil {
		t.Fatal(err)
	}
	u := newUnpacker(t, layer.Config{MemoryBytes: 4 << 20}) // a block that is held too long stops it
	into := t.TempDir()
	if _, err := u.Unpack(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), into); err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(describe(t, want, none), describe(t, into, none)) {
		t.Error("the tree differs from the plain tar's")
	}
	if _, err := u.UnpackImage(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), filepath.Join(t.TempDir(), "image")); err != nil {
		t.Error(err)
	}
}
