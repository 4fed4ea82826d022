package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/klauspost/compress/zstd"
)

// imageOf has a layer for each list of entries.
func imageOf(t *testing.T, layers ...[]odd) v1.Image {
	t.Helper()
	image := empty.Image
	for _, entries := range layers {
		var packed bytes.Buffer
		out := tar.NewWriter(&packed)
		if err := writeEntries(out, entries); err != nil {
			t.Fatal(err)
		}
		if err := out.Close(); err != nil {
			t.Fatal(err)
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed.Bytes())), nil })
		if err != nil {
			t.Fatal(err)
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			t.Fatal(err)
		}
	}
	return image
}

// TestManyLayers cuts a tree with hard links into layers that can each be unpacked, and that together are what it was.
func TestManyLayers(t *testing.T) {
	var packages []odd
	for d := range 20 {
		packages = append(packages, folder(fmt.Sprintf("usr%d", d)), folder(fmt.Sprintf("usr%d/lib", d)))
		for f := range 7 {
			packages = append(packages, regular(fmt.Sprintf("usr%d/lib/%d", d, f), "content"))
		}
		packages = append(packages, linked(tar.TypeLink, fmt.Sprintf("usr%d/lib/z", d), fmt.Sprintf("usr%d/lib/0", d)))
	}
	source := imageOf(t, []odd{folder("etc")}, packages, []odd{regular("function", "f")})
	s := &shape{ctx: t.Context(), from: map[string]v1.Image{"python": source}, dir: t.TempDir()}
	if err := s.many(); err != nil {
		t.Fatal(err)
	}
	if len(s.layers) < layerCount-18 || len(s.layers) > layerCount { // runs may not end where a link spans
		t.Errorf("%d layers", len(s.layers))
	}
	all := map[string]bool{}
	for i, l := range s.layers {
		here := map[string]bool{}
		content, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range read(t, gunzip(t, content)) {
			if dir := path.Dir(strings.TrimSuffix(e.Name, "/")) + "/"; dir != "./" && !here[dir] {
				t.Errorf("layer %d has %s without its folder", i, e.Name)
			}
			if e.Link != "" && !here[e.Link] {
				t.Errorf("layer %d has %s without what it links to", i, e.Name)
			}
			here[e.Name] = true
		}
		maps.Copy(all, here)
	}
	want := map[string]bool{"etc/": true, "function": true}
	for _, e := range packages {
		want[e.Name] = true
	}
	if diff := cmp.Diff(want, all); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// TestTorture builds the image, and again as zstd: it is valid, and says what it is about.
func TestTorture(t *testing.T) {
	cfg := Config{Cache: t.TempDir()}
	layout, err := Build(t.Context(), cfg, "torture")
	if err != nil {
		t.Fatal(err)
	}
	image, err := open(layout)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(image, validate.Fast); err != nil {
		t.Error(err)
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[byte]bool{}
	sparse := int64(0)
	for _, l := range layers {
		content, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		for in := tar.NewReader(content); ; {
			h, err := in.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			kinds[h.Typeflag] = true
			if h.Name == "sparse" {
				if sparse, err = io.Copy(io.Discard, in); err != nil {
					t.Error(err)
				}
			}
		}
	}
	if want := []byte{tar.TypeReg, tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeDir, tar.TypeFifo}; !slices.Equal(slices.Sorted(maps.Keys(kinds)), want) {
		t.Errorf("kinds of entries %q, want %q", slices.Sorted(maps.Keys(kinds)), want)
	}
	if sparse != 64<<20 {
		t.Errorf("the sparse file has %d bytes", sparse)
	}
	for _, encoding := range []Encoding{Zstd, ZstdFrames} {
		other, err := Encode(t.Context(), cfg, "torture", layout, encoding)
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := open(other)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(encoded, validate.Fast); err != nil {
			t.Error(err)
		}
	}
	if _, err := Encode(t.Context(), cfg, "torture", layout, "lzma"); err == nil {
		t.Error("an unknown encoding was made")
	}
}

// TestFrames decodes each frame by itself.
func TestFrames(t *testing.T) {
	text := bytes.Repeat([]byte("some of a tar "), 1<<20)
	var out bytes.Buffer
	w, err := newFrames(&out)
	if err != nil {
		t.Fatal(err)
	}
	for rest := text; len(rest) > 0; { // in pieces that do not fit the frames
		n := min(len(rest), 1_000_003)
		if _, err := w.Write(rest[:n]); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	decoder, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer decoder.Close()
	if got, err := decoder.DecodeAll(out.Bytes(), nil); err != nil || !bytes.Equal(got, text) {
		t.Fatalf("%d bytes come back of %d: %v", len(got), len(text), err)
	}
	magic := []byte{0x28, 0xb5, 0x2f, 0xfd}
	frames, decoded := bytes.Split(out.Bytes(), magic)[1:], 0
	for _, f := range frames {
		part, err := decoder.DecodeAll(append(slices.Clone(magic), f...), nil)
		if err != nil || !bytes.Equal(part, text[decoded:decoded+len(part)]) {
			t.Fatalf("a frame is not of its own: %v", err)
		}
		decoded += len(part)
	}
	if want := (len(text) + frameBytes - 1) / frameBytes; len(frames) != want || decoded != len(text) {
		t.Errorf("%d frames, want %d; %d bytes", len(frames), want, decoded)
	}
}
