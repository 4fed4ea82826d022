package stack_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hearth-serverless/hearth/bench/images"
)

// pushGo pushes the sample image to the deployment's registry.
func (d *deployment) pushGo(t *testing.T) string {
	t.Helper()
	ref := d.status.Registry + "/go:1"
	if _, err := images.Push(t.Context(), shop.golang, ref); err != nil {
		t.Fatal(err)
	}
	return ref
}

// push uploads an image and gives its reference.
func push(t *testing.T, host, repository string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(host+"/"+repository+":1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

// goImage is the sample image, to be added to.
func goImage(t *testing.T) v1.Image {
	t.Helper()
	index, err := layout.ImageIndexFromPath(shop.golang)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// withLayers adds layers to an image.
func withLayers(t *testing.T, img v1.Image, layers ...v1.Layer) v1.Image {
	t.Helper()
	out, err := mutate.AppendLayers(img, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// layerOf compresses a tar into a layer.
func layerOf(t *testing.T, data []byte) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// entry is a tar entry; what is not set has a default by type.
type entry struct {
	tar.Header
	data string
}

func file(name, data string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755}, data}
}

func link(kind byte, name, target string) entry {
	return entry{tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func tarOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		e.Size = int64(len(e.data))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// probeImage runs testdata/probe.
func probeImage(t *testing.T) v1.Image {
	t.Helper()
	return programImage(t, shop.probe, "probe")
}

// withArgs gives arguments to an image's program.
func withArgs(t *testing.T, img v1.Image, args ...string) v1.Image {
	t.Helper()
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Config.Cmd = args
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

// programImage has one static program, and runs it, with other files beside it.
func programImage(t *testing.T, path, name string, beside ...entry) v1.Image {
	t.Helper()
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	img := withLayers(t, empty.Image, layerOf(t, tarOf(t, append(beside, file(name, string(program)))...)))
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", platform(t)
	config.Config.Entrypoint = []string{"/" + name}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

// platform is the architecture of the sample image, which is this machine's.
func platform(t *testing.T) string {
	t.Helper()
	config, err := goImage(t).ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return config.Architecture
}

// bigLayer takes long enough to unpack that something can happen meanwhile: 150 MB.
func bigLayer(t *testing.T, seed byte) v1.Layer { return noiseLayer(t, seed, 3000) }

// noiseLayer is a layer of files of noise, 50 KiB each. It is not compressed, which would only take the test's time.
func noiseLayer(t *testing.T, seed byte, files int) v1.Layer {
	t.Helper()
	const size = 50 << 10
	noise := rand.NewChaCha8([32]byte{seed})
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for i := range files {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("noise/%03d/%04d", i%100, i), Mode: 0o644, Size: size}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(w, noise, size); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return static.NewLayer(out.Bytes(), types.OCIUncompressedLayer)
}
