package images

import (
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// blob is a packed layer in a file. It has what go-containerregistry derives a layer from, and knows its diffID, which
// that would otherwise decompress everything for.
type blob struct {
	Dgst   v1.Hash `json:"digest"`
	Diff   v1.Hash `json:"diffID"`
	Bytes  int64   `json:"bytes"` // compressed
	path   string
	shared bool // others use the file too: it may be linked, not moved
	media  types.MediaType
}

func (b *blob) Digest() (v1.Hash, error)            { return b.Dgst, nil }
func (b *blob) DiffID() (v1.Hash, error)            { return b.Diff, nil }
func (b *blob) Size() (int64, error)                { return b.Bytes, nil }
func (b *blob) MediaType() (types.MediaType, error) { return cmp.Or(b.media, types.OCILayer), nil }
func (b *blob) Compressed() (io.ReadCloser, error)  { return os.Open(b.path) }

// pack writes the tree under root as a layer to the file path, compressed as builders of images commonly do it. lower are
// the trees that it was an overlay of, if any.
func pack(ctx context.Context, root string, lower []string, path string) (*blob, error) {
	b, err := packed(path, func(w io.Writer) error { return writeLayer(ctx, w, root, lower) })
	if err != nil {
		return nil, fmt.Errorf("pack %s: %w", root, err)
	}
	return b, nil
}

// packed is a layer in the file path of the tar that write makes, compressed as builders of images commonly do it.
func packed(path string, write func(io.Writer) error) (*blob, error) {
	return encoded(path, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }, write)
}

// encoded is a layer in the file path of the tar that write makes, by way of a compressor.
func encoded(path string, compressor func(io.Writer) (io.WriteCloser, error), write func(io.Writer) error) (*blob, error) {
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	digest, diff := sha256.New(), sha256.New()
	out := &counter{w: io.MultiWriter(file, digest)}
	zip, err := compressor(out)
	if err != nil {
		return nil, err
	}
	if err := write(io.MultiWriter(zip, diff)); err != nil {
		return nil, errors.Join(err, zip.Close())
	}
	if err := zip.Close(); err != nil {
		return nil, err
	}
	if err := file.Close(); err != nil {
		return nil, err
	}
	return &blob{Dgst: sum(digest), Diff: sum(diff), Bytes: out.n, path: path}, nil
}

func sum(h hash.Hash) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}
}

// counter counts the bytes that pass.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
