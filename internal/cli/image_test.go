package cli_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

// imageRegistry serves an image of two layers, one of them twice, and gives its reference.
func imageRegistry(t testing.TB) (ref string) {
	t.Helper()
	server := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(true)))
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	ref = host + "/lib/app:1"
	c, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	var config ocispec.Image
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	m.SchemaVersion = 2
	config.OS, config.Architecture, config.RootFS.Type = "linux", runtime.GOARCH, "layers"
	for _, name := range []string{"one", "two", "one"} {
		blob, diffID := gzipLayer(t, name, strings.Repeat("some text in "+name+" ", 100_000))
		m.Layers = append(m.Layers, pushBlob(t, c, ref, ocispec.MediaTypeImageLayerGzip, blob))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	}
	m.Config = pushBlob(t, c, ref, ocispec.MediaTypeImageConfig, mustJSON(t, config))
	putManifest(t, ref, m.MediaType, m)
	return ref
}

// putManifest stores a manifest under a tag.
func putManifest(t testing.TB, ref, mediaType string, m any) ocispec.Descriptor {
	t.Helper()
	data := mustJSON(t, m)
	host, rest, _ := strings.Cut(ref, "/")
	name, tag, _ := strings.Cut(rest, ":")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+host+"/v2/"+name+"/manifests/"+tag, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != http.StatusCreated {
		t.Fatal(resp, err)
	}
	resp.Body.Close()
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func pushBlob(t testing.TB, c *registry.Client, ref, mediaType string, data []byte) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if _, err := c.PutBlob(t.Context(), ref, desc, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	return desc
}

func gzipLayer(t testing.TB, name, content string) (blob []byte, diffID digest.Digest) {
	t.Helper()
	var raw, packed bytes.Buffer
	w := tar.NewWriter(&raw)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write([]byte(content))
	_ = w.Close()
	diffID = digest.FromBytes(raw.Bytes())
	z := gzip.NewWriter(&packed)
	_, _ = z.Write(raw.Bytes())
	_ = z.Close()
	return packed.Bytes(), diffID
}

func TestAccelerate(t *testing.T) {
	f := newFake(t)
	ref := imageRegistry(t)
	before := f.want(t, 0, "gzip", "image", "inspect", ref)
	if strings.Contains(before, "ZSTD") {
		t.Errorf("has siblings before: %s", before)
	}
	f.want(t, 0, "is accelerated: [lz4]", "image", "accelerate", ref, "--encoding", "lz4")
	var result struct {
		Encodings []string
		Bytes     int64
		Already   bool
	}
	out := f.want(t, 0, "", "image", "accelerate", ref, "-o", "json")
	if err := json.Unmarshal([]byte(out), &result); err != nil || len(result.Encodings) != 1 || result.Encodings[0] != "zstd" || result.Bytes == 0 || result.Already {
		t.Errorf("adds zstd to LZ4 with %s (%v)", out, err)
	}
	f.want(t, 0, "is already accelerated", "image", "accelerate", ref)
	f.want(t, 0, "ZSTD", "image", "inspect", ref)

	var image struct {
		Layers []struct {
			Digest, Encoding string
			DiffID           digest.Digest `json:"diff_id"`
			Size, Unpacked   int64
			Siblings         []struct {
				Encoding string
				Digest   digest.Digest
				Size     int64
				Ratio    float64
			}
		}
	}
	out = f.want(t, 0, "", "image", "inspect", ref, "-o", "json")
	if err := json.Unmarshal([]byte(out), &image); err != nil {
		t.Fatal(err)
	}
	c, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range image.Layers {
		if l.Encoding != "gzip" || len(l.Siblings) != 2 || l.Unpacked == 0 {
			t.Errorf("layer %+v", l)
		}
		for _, s := range l.Siblings { // what is in the registry unpacks to the image's tar
			src, err := c.Open(t.Context(), ref, registry.Layer{Digest: s.Digest, Size: s.Size})
			if err != nil {
				t.Fatal(err)
			}
			n, err := u.Decompress(t.Context(), src, layer.Spec{Digest: s.Digest, DiffID: l.DiffID, Size: s.Size, Indexed: true}, io.Discard)
			if err != nil || n != l.Unpacked || s.Ratio <= 0 || s.Ratio >= 1 {
				t.Errorf("%s: %d bytes, ratio %v, error %v", s.Encoding, n, s.Ratio, err)
			}
			src.Close()
		}
	}
	f.want(t, 1, "is the reference right", "image", "inspect", strings.Replace(ref, "app:1", "app:2", 1))
	f.want(t, 1, "is the reference right", "image", "accelerate", strings.Replace(ref, "app:1", "app:2", 1))
}

// TestAcceleratePlatforms has an index with an image for this machine, one for another, and an attestation.
func TestAcceleratePlatforms(t *testing.T) {
	f := newFake(t)
	ref := imageRegistry(t)
	c, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ours, err := c.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	other := "s390x"
	blob, diffID := gzipLayer(t, "other", strings.Repeat("some other text ", 100_000))
	var config ocispec.Image
	config.OS, config.Architecture = "linux", other
	config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{pushBlob(t, c, ref, ocispec.MediaTypeImageLayerGzip, blob)}}
	m.SchemaVersion = 2
	m.Config = pushBlob(t, c, ref, ocispec.MediaTypeImageConfig, mustJSON(t, config))
	entry := func(d ocispec.Descriptor, os, arch string) ocispec.Descriptor {
		d.Platform = &ocispec.Platform{OS: os, Architecture: arch}
		return d
	}
	theirs := putManifest(t, strings.TrimSuffix(ref, ":1")+":other", m.MediaType, m)
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		entry(ocispec.Descriptor{MediaType: ours.MediaType, Digest: ours.Digest, Size: ours.Size}, "linux", runtime.GOARCH),
		entry(theirs, "linux", other), entry(theirs, "unknown", "unknown"),
	}}
	index.SchemaVersion = 2
	list := strings.TrimSuffix(ref, ":1") + ":list"
	putManifest(t, list, index.MediaType, index)

	f.want(t, 1, "linux/"+other, "image", "accelerate", list, "--platform", "linux/unheard-of")
	f.want(t, 0, "for linux/"+other+" is accelerated: [zstd lz4]", "image", "accelerate", list, "--platform", "linux/"+other)
	if found, err := c.Siblings(t.Context(), list, ours.Digest); err != nil || len(found) > 0 {
		t.Errorf("this machine's image has siblings %v, error %v", found, err)
	}
	out := f.want(t, 0, "for linux/"+runtime.GOARCH+" is accelerated", "image", "accelerate", list, "--platform", "all")
	if !strings.Contains(out, "for linux/"+other+" is already accelerated") {
		t.Errorf("says %s", out)
	}
	for _, d := range []digest.Digest{ours.Digest, theirs.Digest} {
		if found, err := c.Siblings(t.Context(), list, d); err != nil || len(found) == 0 {
			t.Errorf("image %s has siblings %v, error %v", d, found, err)
		}
	}
	f.want(t, 0, "is already accelerated", "image", "accelerate", ref, "--platform", "all")
}

// TestAccelerateRefusesWrongLayers has an image whose layer is not what it says: nothing may be attached.
func TestAccelerateRefusesWrongLayers(t *testing.T) {
	f := newFake(t)
	ref := imageRegistry(t)
	c, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	img, err := c.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	var config ocispec.Image
	config.OS, config.Architecture, config.RootFS.DiffIDs = "linux", runtime.GOARCH, []digest.Digest{digest.FromString("something else")}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: pushBlob(t, c, ref, ocispec.MediaTypeImageConfig, mustJSON(t, config))}
	m.SchemaVersion = 2
	m.Layers = []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: img.Layers[0].Digest, Size: img.Layers[0].Size}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+strings.Replace(ref, "/lib/app:1", "/v2/lib/app/manifests/wrong", 1), bytes.NewReader(mustJSON(t, m)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", m.MediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	wrong := strings.Replace(ref, "app:1", "app:wrong", 1)
	f.want(t, 1, "diffID mismatch", "image", "accelerate", wrong)
	if out := f.want(t, 0, "gzip", "image", "inspect", wrong); strings.Contains(out, "ZSTD") {
		t.Errorf("something was attached: %s", out)
	}
}
