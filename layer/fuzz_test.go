package layer_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hearth-serverless/hearth/layer"
)

func FuzzUnpack(f *testing.F) {
	for _, ents := range torture() {
		small := ents[:0:0]
		for _, e := range ents {
			if len(e.data) < 1000 {
				small = append(small, e)
			}
		}
		f.Add(makeTar(f, small...))
	}
	f.Add(makeTar(f, link("l", "../.."), file("l/canary", "x")))
	f.Add(makeTar(f, file("../canary", "x"), hard("h", "/etc/passwd")))
	f.Add(compress(f, layer.Gzip, makeTar(f, file("a", "b"))))
	f.Add(compress(f, layer.Zstd, makeTar(f, file("a", "b"))))
	f.Add(compress(f, layer.LZ4, makeTar(f, file("a", "b"))))
	f.Add(sparseTar(f, 9000))
	for _, ents := range corners() {
		f.Add(makeTar(f, ents[:min(len(ents), 20)]...))
	}
	where := "/dev/shm"
	if _, err := os.Stat(where); err != nil {
		where = f.TempDir()
	}
	u := newUnpacker(f, layer.Config{Limits: layer.Limits{MaxBytes: 4 << 20, MaxEntries: 1000}})
	f.Fuzz(func(t *testing.T, data []byte) {
		y := newYard(t, where)
		dir, derr := u.Unpack(t.Context(), bytes.NewReader(data), specOf(data, data), y.into)
		y.unharmed(t)
		file := filepath.Join(y.outer, "image")
		image, ierr := u.UnpackImage(t.Context(), bytes.NewReader(data), specOf(data, data), file)
		if ierr == nil {
			checkImage(t, file)
		}
		for _, err := range []error{layer.ErrCorrupt, layer.ErrUnsupported} {
			if derr, ierr := errors.Is(derr, err), errors.Is(ierr, err); derr != ierr {
				t.Errorf("%v: %t for a directory, %t for an image", err, derr, ierr)
			}
		}
		if derr == nil && ierr == nil && !slices.Equal(dir.ImplicitDirs, image.ImplicitDirs) {
			t.Errorf("implicit directories: %q in a directory, %q in an image", dir.ImplicitDirs, image.ImplicitDirs)
		}
	})
}

func FuzzSniff(f *testing.F) {
	for _, format := range []layer.Format{layer.Tar, layer.Gzip, layer.Zstd, layer.LZ4} {
		f.Add(compress(f, format, makeTar(f, file("a", "b"))))
	}
	f.Add([]byte{0x5e, 0x2a, 0x4d, 0x18, 0, 0, 0, 0, 0x5e, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, head []byte) {
		if got := layer.Sniff(head); got < layer.Tar || got > layer.LZ4 {
			t.Errorf("format %d", got)
		}
	})
}
