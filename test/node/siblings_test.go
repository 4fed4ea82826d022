package node_test

import (
	"bytes"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

// attach gives an image siblings made of tars, which an honest one has from the image itself.
func attach(t *testing.T, ref string, e layer.Encoding, tars ...[]byte) {
	t.Helper()
	c, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	img, err := c.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	var siblings []registry.Sibling
	for i, l := range img.Layers {
		var blob bytes.Buffer
		w, err := layer.NewEncoder(&blob, e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(tars[i]); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		desc := ocispec.Descriptor{Digest: digest.FromBytes(blob.Bytes()), Size: int64(blob.Len())}
		if _, err := c.PutBlob(t.Context(), ref, desc, bytes.NewReader(blob.Bytes())); err != nil {
			t.Fatal(err)
		}
		siblings = append(siblings, registry.Sibling{
			Layer:    registry.Layer{Digest: desc.Digest, DiffID: l.DiffID, Size: desc.Size, MediaType: registry.SiblingMediaType(string(e))},
			Original: l.Digest, Encoding: string(e), Bytes: int64(len(tars[i])), FrameBytes: layer.FrameBytes,
		})
	}
	if err := c.AttachSiblings(t.Context(), img, string(e), siblings); err != nil {
		t.Fatal(err)
	}
}

// TestPullSiblings pulls an accelerated image: it is the same image, and the original layers are not unpacked. Siblings that
// unpack to something else are not believed.
func TestPullSiblings(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *pullNode) {
		tars := tortureLayers(t)
		for _, e := range []layer.Encoding{layer.EncodingZstd, layer.EncodingLZ4} {
			for _, honest := range []bool{true, false} {
				name := map[bool]string{true: "honest", false: "lying"}[honest] + "-" + string(e)
				own := append([][]byte{tarball(t, fileEntry("name", name))}, tars...)
				img := imageOf(t, gzipped, own...)
				ref := n.registry.push(t, "siblings:"+name, img)
				if honest {
					attach(t, ref, e, own...)
				} else {
					attach(t, ref, e, append([][]byte{tarball(t, fileEntry("name", "?"))}, tars...)...)
				}
				fetched := n.countBlobs(t, img)
				if err := n.pull(t, ref, nil); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				original, other := fetched()
				if honest && other == 0 || !honest && original == 0 {
					t.Errorf("%s: %d original blobs were fetched and %d others", name, original, other)
				}
				if present := n.blobsPresent(t, img); present != 0 {
					t.Errorf("%s: %d layers were left to containerd", name, present)
				}
				if diff := cmp.Diff(n.reference(t, ref, img), n.trees(t, n.context(t), "hearth", img)); diff != "" {
					t.Errorf("%s: -containerd +hearth\n%s", name, diff)
				}
			}
		}
	})
}

// countBlobs counts the layers' blobs that are asked for from now on, and others.
func (n *pullNode) countBlobs(t *testing.T, img v1.Image) (fetched func() (original, other int64)) {
	t.Helper()
	known := map[string]bool{}
	for _, h := range layerDigests(t, img) {
		known[h.String()] = true
	}
	config, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	var original, other atomic.Int64
	watch := func(_ http.ResponseWriter, r *http.Request) bool {
		if _, dgst, ok := strings.Cut(r.URL.Path, "/blobs/"); ok && r.Method == http.MethodGet && dgst != config.String() {
			if known[dgst] {
				original.Add(1)
			} else {
				other.Add(1)
			}
		}
		return false
	}
	n.registry.fault.Store(&watch)
	return func() (int64, int64) {
		n.registry.fault.Store(nil)
		return original.Load(), other.Load()
	}
}
