package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// config is that of an image made by r.
func (r recipe) config() *v1.ConfigFile {
	return &v1.ConfigFile{
		Architecture: runtime.GOARCH,
		OS:           "linux",
		Config: v1.Config{
			Entrypoint: runtimeEntrypoint(r.Runtime),
			Cmd:        r.Cmd,
			Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		},
	}
}

// assemble joins layers, lowest first, into an image with a configuration, and writes it into dir as an OCI layout. The layers'
// files become the layout's.
func assemble(config *v1.ConfigFile, layers []*blob, dir string) error {
	config = config.DeepCopy()
	config.RootFS, config.History = v1.RootFS{Type: "layers"}, nil // both are of the layers that follow
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.ConfigFile(image, config)
	if err != nil {
		return err
	}
	for _, l := range layers {
		layer, err := partial.CompressedToLayer(l)
		if err != nil {
			return err
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return err
		}
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	for _, l := range layers {
		if err := l.place(dir); err != nil {
			return err
		}
	}
	return path.AppendImage(image) // which finds the layers in place, and writes manifest and config
}

// place puts the layer's file where a layout keeps it. A shared file is linked, or copied where that is not possible.
func (b *blob) place(dir string) error {
	to := filepath.Join(dir, "blobs", b.Dgst.Algorithm, b.Dgst.Hex)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if b.shared {
		_ = os.Link(b.path, to) // not done, it is copied when the image is appended
		return nil
	}
	if err := os.Rename(b.path, to); err != nil {
		return err
	}
	b.path = to
	return nil
}

// open returns the one image of a layout.
func open(layoutPath string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(layoutPath)
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	if len(manifest.Manifests) != 1 {
		return nil, errors.New("not a layout of one image")
	}
	return index.Image(manifest.Manifests[0].Digest)
}
