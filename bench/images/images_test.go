package images_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/hearth-serverless/hearth/bench/images"
)

func build(t *testing.T, cache, image string) string {
	t.Helper()
	path, err := images.Build(t.Context(), images.Config{Cache: cache, Progress: func(line string) { t.Log(line) }}, image)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t *testing.T, path string) v1.Image {
	t.Helper()
	index, err := layout.ImageIndexFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 {
		t.Fatalf("%d manifests, want 1", len(manifest.Manifests))
	}
	image, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func TestStaticImages(t *testing.T) {
	cache := t.TempDir()
	for _, test := range []struct{ image, file string }{{"go", "function"}, {"pause", "pause"}} {
		t.Run(test.image, func(t *testing.T) {
			image := load(t, build(t, cache, test.image))
			if err := validate.Image(image); err != nil {
				t.Error(err)
			}
			config, err := image.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{"/" + test.file}, config.Config.Cmd); diff != "" {
				t.Errorf("command (-want +got):\n%s", diff)
			}
			if got := len(config.RootFS.DiffIDs); got != 1 {
				t.Errorf("%d layers, want 1", got)
			}
			flat := mutate.Extract(image)
			defer flat.Close()
			var names []string
			entries := tar.NewReader(flat)
			for {
				header, err := entries.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				names = append(names, header.Name)
				if header.Mode&0o111 != 0o111 {
					t.Errorf("%s has mode %o: not for all to run", header.Name, header.Mode)
				}
			}
			if diff := cmp.Diff([]string{test.file}, names); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
		})
	}
}

func TestBuildIsCachedAndReproducible(t *testing.T) {
	cache, other := t.TempDir(), t.TempDir()
	var wg sync.WaitGroup
	paths := make([]string, 4)
	for i := range paths {
		wg.Go(func() {
			paths[i], _ = images.Build(t.Context(), images.Config{Cache: cache}, "pause")
		})
	}
	wg.Wait()
	for _, path := range paths {
		if path == "" || path != paths[0] {
			t.Fatalf("concurrent builds gave %q", paths)
		}
	}
	silent := images.Config{Cache: cache, Progress: func(line string) { t.Errorf("second build says %q, want nothing built", line) }}
	if again, err := images.Build(t.Context(), silent, "pause"); err != nil || again != paths[0] {
		t.Errorf("second build: %q, %v; want %q", again, err, paths[0])
	}
	first, err := load(t, paths[0]).Digest()
	if err != nil {
		t.Fatal(err)
	}
	second, err := load(t, build(t, other, "pause")).Digest()
	if err != nil {
		t.Fatal(err)
	}
	if first != second {
		t.Errorf("two builds have digests %s and %s", first, second)
	}
}

func TestBuildRefuses(t *testing.T) {
	cache := t.TempDir()
	_, err := images.Build(t.Context(), images.Config{Cache: cache}, "cobol")
	if err == nil || !strings.Contains(err.Error(), "python") {
		t.Errorf("error %v: want one that names the images there are", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := images.Build(ctx, images.Config{Cache: cache}, "pause"); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that of the context", err)
	}
	left, err := filepath.Glob(filepath.Join(cache, "images", "*pause*-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("a cancelled build left %q, %v", left, err)
	}
}

func TestPush(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	path := build(t, t.TempDir(), "pause")
	ref := strings.TrimPrefix(server.URL, "http://") + "/hearth/pause:1"
	digest, err := images.Push(t.Context(), path, ref)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	image, err := remote.Image(parsed)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(image); err != nil {
		t.Error(err)
	}
	if got, err := image.Digest(); err != nil || got.String() != digest {
		t.Errorf("the registry has %v, %v; Push returned %s", got, err, digest)
	}
	fetched, err := images.Fetch(t.Context(), images.Config{Cache: t.TempDir()}, "theirs", ref)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := load(t, fetched).Digest(); err != nil || got.String() != digest {
		t.Errorf("what was fetched has digest %v, %v; want %s", got, err, digest)
	}
	if _, err := images.Push(t.Context(), t.TempDir(), ref); err == nil {
		t.Error("an empty folder was pushed")
	}
}

func TestExportTar(t *testing.T) {
	const ref = "hearth.local/pause:1"
	path := build(t, t.TempDir(), "pause")
	var exported bytes.Buffer
	if err := images.ExportTar(path, ref, &exported); err != nil {
		t.Fatal(err)
	}
	unpacked := t.TempDir()
	entries := tar.NewReader(&exported)
	for {
		header, err := entries.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(entries)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(unpacked, header.Name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := validate.Image(load(t, unpacked)); err != nil {
		t.Error(err)
	}
	index, err := layout.ImageIndexFromPath(unpacked)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": "1"}
	if diff := cmp.Diff(want, manifest.Manifests[0].Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
}
