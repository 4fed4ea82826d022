package codepack

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

// What tells a code package from an image to run.
const (
	ArtifactType      = "application/vnd.hearth.code.v1"
	AnnotationRuntime = "dev.hearth.runtime"
	AnnotationHandler = "dev.hearth.handler"
)

const (
	fileMode       = 0o644
	executableMode = 0o755

	// openFlags keep what has become a pipe meanwhile from being waited for.
	openFlags = os.O_RDONLY | unix.O_NONBLOCK
)

// Package is an OCI image of one layer, which lies in a file without a name: code, or programs. Close it.
type Package struct {
	digest           digest.Digest // of the manifest
	manifest, config []byte
	configDesc       ocispec.Descriptor
	layerDesc        ocispec.Descriptor
	blob             *os.File
}

// Digest of the package, by which a Function names it.
func (p *Package) Digest() digest.Digest { return p.digest }

// Size is what nodes fetch.
func (p *Package) Size() int64 { return p.layerDesc.Size }

// Close removes the file.
func (p *Package) Close() { _ = p.blob.Close() }

// Pack reads the Tree's files and makes a Package of them, for a Runtime and a handler in it. done is told how many bytes were
// read.
func (t *Tree) Pack(ctx context.Context, runtimeName, handler string, done *atomic.Int64) (*Package, error) {
	// The architecture is that of this machine: containerd looks for its own, and compiled dependencies are for one only.
	image := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}}
	return t.pack(ctx, image, ocispec.Manifest{
		ArtifactType: ArtifactType, Annotations: map[string]string{AnnotationRuntime: runtimeName, AnnotationHandler: handler},
	}, done)
}

// PackImage makes a Package that containers are made of: the Tree's files are all that they see. The image says what is executed,
// and for which machine.
func (t *Tree) PackImage(ctx context.Context, image ocispec.Image) (*Package, error) {
	return t.pack(ctx, image, ocispec.Manifest{}, &atomic.Int64{})
}

// pack completes the image and its manifest.
func (t *Tree) pack(ctx context.Context, image ocispec.Image, manifest ocispec.Manifest, done *atomic.Int64) (*Package, error) {
	blob, err := unnamedFile()
	if err == nil {
		var p *Package
		if p, err = t.packInto(ctx, blob, image, manifest, done); err == nil {
			return p, nil
		}
		_ = blob.Close()
	}
	return nil, fmt.Errorf("pack %s: %w", t.path, err)
}

func unnamedFile() (*os.File, error) {
	f, err := os.CreateTemp("", "hearth-code-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (t *Tree) packInto(ctx context.Context, blob *os.File, image ocispec.Image, manifest ocispec.Manifest, done *atomic.Int64) (*Package, error) {
	diffID, desc, err := t.writeLayer(ctx, blob, done)
	if err != nil {
		return nil, err
	}
	p := &Package{blob: blob, layerDesc: desc}
	image.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}}
	if p.config, err = json.Marshal(image); err != nil {
		return nil, err
	}
	p.configDesc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(p.config), Size: int64(len(p.config))}
	manifest.Versioned, manifest.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest
	manifest.Config, manifest.Layers = p.configDesc, []ocispec.Descriptor{p.layerDesc}
	if p.manifest, err = json.Marshal(manifest); err != nil {
		return nil, err
	}
	p.digest = digest.FromBytes(p.manifest)
	return p, nil
}

// writeLayer writes the blob and says what it is.
func (t *Tree) writeLayer(ctx context.Context, blob *os.File, done *atomic.Int64) (digest.Digest, ocispec.Descriptor, error) {
	var desc ocispec.Descriptor
	sum, diffID := digest.Canonical.Digester(), digest.Canonical.Digester()
	encoder, err := layer.NewEncoder(io.MultiWriter(blob, sum.Hash()), layer.EncodingZstd)
	if err != nil {
		return "", desc, err
	}
	defer encoder.Abort()
	if err := t.writeTar(ctx, io.MultiWriter(encoder, diffID.Hash()), done); err != nil {
		return "", desc, err
	}
	if err := encoder.Close(); err != nil {
		return "", desc, err
	}
	info, err := blob.Stat()
	if err != nil {
		return "", desc, err
	}
	desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: sum.Digest(), Size: info.Size()}
	return diffID.Digest(), desc, nil
}

// writeTar writes every entry, and the folder that they are in: a layer that left it out would take it from layers below.
func (t *Tree) writeTar(ctx context.Context, to io.Writer, done *atomic.Int64) error {
	w := tar.NewWriter(to)
	if err := w.WriteHeader(header("./", entry{kind: fs.ModeDir})); err != nil {
		return err
	}
	for _, name := range t.names() {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := t.entries[name]
		if e.kind == fs.ModeDir {
			name += "/"
		}
		if err := w.WriteHeader(header(name, e)); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		if e.kind != 0 {
			continue
		}
		if err := e.copyTo(ctx, w, done); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
	}
	return w.Close()
}

// header has nothing of the machine, the day or the owner.
func header(name string, e entry) *tar.Header {
	h := &tar.Header{Name: name, Mode: fileMode, Size: e.size, Linkname: e.link, Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}
	switch {
	case e.kind == fs.ModeDir:
		h.Typeflag, h.Mode = tar.TypeDir, executableMode
	case e.kind == fs.ModeSymlink:
		h.Typeflag, h.Mode = tar.TypeSymlink, 0o777
	case e.executable:
		h.Mode = executableMode
	}
	return h
}

var errChanged = errors.New("changed while it was packed; try again")

// copyTo copies a file, which has to be as it was.
func (e entry) copyTo(ctx context.Context, w io.Writer, done *atomic.Int64) error {
	f, err := e.from.root.OpenFile(e.name, openFlags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return errChanged
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() != e.size {
		return errChanged
	}
	n, err := io.Copy(w, io.LimitReader(&progressReader{ctx, f, done}, e.size))
	if err == nil && n != e.size {
		return errChanged
	}
	return err
}

// progressReader counts, and ends with its context.
type progressReader struct {
	ctx   context.Context
	r     io.Reader
	count *atomic.Int64
}

// Read implements io.Reader.
func (r *progressReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(p)
	r.count.Add(int64(n))
	return n, err
}

// Push stores the package in a repository, HOST/NAME, and gives the reference by digest. What the registry has already is not
// sent again. done is told how many bytes of the layer are there. A tag keeps registries from sweeping the package away.
func (p *Package) Push(ctx context.Context, c *registry.Client, repository string, done *atomic.Int64) (ref string, err error) {
	tagged := repository + ":" + p.digest.Encoded()[:16]
	existed, err := c.PutBlob(ctx, tagged, p.layerDesc, &progressReaderAt{p.blob, done})
	if err != nil {
		return "", err
	}
	if existed {
		done.Store(p.layerDesc.Size)
	}
	if _, err := c.PutBlob(ctx, tagged, p.configDesc, bytes.NewReader(p.config)); err != nil {
		return "", err
	}
	if err := c.PutManifest(ctx, tagged, ocispec.MediaTypeImageManifest, p.manifest); err != nil {
		return "", err
	}
	return repository + "@" + p.digest.String(), nil
}

// Tag names the package, which was pushed to the repository before.
func (p *Package) Tag(ctx context.Context, c *registry.Client, repository, tag string) error {
	return c.PutManifest(ctx, repository+":"+tag, ocispec.MediaTypeImageManifest, p.manifest)
}

// progressReaderAt tells up to where was read: after a failure that is less than before.
type progressReaderAt struct {
	r    io.ReaderAt
	upTo *atomic.Int64
}

// ReadAt implements io.ReaderAt.
func (r *progressReaderAt) ReadAt(b []byte, off int64) (int, error) {
	n, err := r.r.ReadAt(b, off)
	r.upTo.Store(off + int64(n))
	return n, err
}
