package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Push uploads the image of a layout under ref, such as "127.0.0.1:5000/python:1", to a registry that speaks plain HTTP
// and wants no credentials. It returns the manifest's digest; layers that the registry has are not sent again.
func Push(ctx context.Context, layoutPath, ref string) (digest string, err error) {
	target, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return "", fmt.Errorf("push image: %w", err)
	}
	image, err := open(layoutPath)
	if err != nil {
		return "", fmt.Errorf("push %s from %s: %w", ref, layoutPath, err)
	}
	hash, err := image.Digest()
	if err != nil {
		return "", fmt.Errorf("push %s from %s: %w", ref, layoutPath, err)
	}
	if err := remote.Write(target, image, remote.WithContext(ctx)); err != nil {
		return "", fmt.Errorf("push %s: %w", ref, err)
	}
	return hash.String(), nil
}

// ExportTar writes a layout to w as a tar that names its image ref, as `ctr images import` and containerd's client take
// it.
func ExportTar(layoutPath, ref string, w io.Writer) error {
	if err := exportTar(layoutPath, ref, w); err != nil {
		return fmt.Errorf("export %s from %s: %w", ref, layoutPath, err)
	}
	return nil
}

// ExportFile is ExportTar into a file, which is there whole or not at all.
func ExportFile(layoutPath, ref, file string) error {
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return fmt.Errorf("export %s: %w", ref, err)
	}
	err = errors.Join(ExportTar(layoutPath, ref, f), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

func exportTar(layoutPath, ref string, w io.Writer) error {
	index, err := namedIndex(layoutPath, ref)
	if err != nil {
		return err
	}
	out := tar.NewWriter(w)
	if err := addFile(out, "oci-layout", strings.NewReader(ociLayout), int64(len(ociLayout))); err != nil {
		return err
	}
	if err := addFile(out, "index.json", bytes.NewReader(index), int64(len(index))); err != nil {
		return err
	}
	blobs, err := filepath.Glob(filepath.Join(layoutPath, "blobs", "sha256", "*"))
	if err != nil {
		return err
	}
	for _, path := range blobs {
		if err := addBlob(out, path); err != nil {
			return err
		}
	}
	return out.Close()
}

const ociLayout = `{"imageLayoutVersion":"1.0.0"}`

// namedIndex returns the layout's index with annotations that give its one image the name ref.
func namedIndex(layoutPath, ref string) ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(layoutPath, "index.json"))
	if err != nil {
		return nil, err
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(text, &index); err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	if len(index.Manifests) != 1 {
		return nil, errors.New("not a layout of one image")
	}
	parsed, err := name.NewTag(ref)
	if err != nil {
		return nil, err
	}
	index.Manifests[0].Annotations = map[string]string{
		"io.containerd.image.name":          ref,
		"org.opencontainers.image.ref.name": parsed.TagStr(),
	}
	return json.Marshal(index)
}

func addBlob(out *tar.Writer, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	return addFile(out, "blobs/sha256/"+filepath.Base(path), file, info.Size())
}

func addFile(out *tar.Writer, name string, content io.Reader, bytes int64) error {
	err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: bytes, ModTime: time.Unix(0, 0)})
	if err != nil {
		return err
	}
	_, err = io.Copy(out, content)
	return err
}

// Layer is one of an image's, as a registry has it.
type Layer struct {
	Digest string
	Bytes  int64 // compressed
}

// Layers of a layout's image, lowest first.
func Layers(layoutPath string) ([]Layer, error) {
	image, err := open(layoutPath)
	if err != nil {
		return nil, err
	}
	manifest, err := image.Manifest()
	if err != nil {
		return nil, fmt.Errorf("read the manifest of %s: %w", layoutPath, err)
	}
	layers := make([]Layer, len(manifest.Layers))
	for i, l := range manifest.Layers {
		layers[i] = Layer{Digest: l.Digest.String(), Bytes: l.Size}
	}
	return layers, nil
}
