package images

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// Encoding is how the layers of an image are compressed.
type Encoding string

const (
	// Gzip is what nearly every image has.
	Gzip Encoding = "gzip"
	// Zstd is one frame a layer, as image builders write it: what is decoded refers to all that came before.
	Zstd Encoding = "zstd"
	// ZstdFrames is many frames a layer, each of its own and of known length.
	ZstdFrames Encoding = "zstd-frames"
)

// frameBytes of the tar go into one of many frames.
const frameBytes = 4 << 20

// encoderVersion is part of the cache's key of what was encoded: raise it when that changes.
const encoderVersion = 1

// Encode returns a layout of the same image with its layers compressed otherwise; their diffIDs, and so the trees, stay the same.
// It is cached as images are (see Build). Gzip is the layout itself.
func Encode(ctx context.Context, cfg Config, name, layoutPath string, encoding Encoding) (string, error) {
	compressor, ok := map[Encoding]func(io.Writer) (io.WriteCloser, error){Zstd: newZstd, ZstdFrames: newFrames}[encoding]
	if encoding == Gzip {
		return layoutPath, nil
	}
	if !ok {
		return "", fmt.Errorf("encode %s: there is no encoding %q", name, encoding)
	}
	b, err := newBuilder(cfg)
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", name, err)
	}
	image, err := open(layoutPath)
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", name, err)
	}
	digest, err := image.Digest()
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", name, err)
	}
	path, err := b.cached(ctx, name+"-"+string(encoding), key(digest, encoding, encoderVersion), func(dir string) error {
		return b.step(name, "compress its layers by "+string(encoding), func() error {
			return encodeImage(ctx, image, compressor, dir)
		})
	})
	if err != nil {
		return "", fmt.Errorf("encode %s by %s: %w", name, encoding, err)
	}
	return path, nil
}

func encodeImage(ctx context.Context, image v1.Image, compressor func(io.Writer) (io.WriteCloser, error), dir string) error {
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	layers, err := image.Layers()
	if err != nil {
		return err
	}
	blobs := make([]*blob, len(layers))
	for i, l := range layers {
		if err := ctx.Err(); err != nil {
			return err
		}
		if blobs[i], err = encodeLayer(l, compressor, filepath.Join(dir, fmt.Sprintf("layer-%d.tar.zst", i))); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return assemble(config, blobs, dir)
}

func encodeLayer(l v1.Layer, compressor func(io.Writer) (io.WriteCloser, error), file string) (*blob, error) {
	content, err := l.Uncompressed()
	if err != nil {
		return nil, err
	}
	defer content.Close()
	b, err := encoded(file, compressor, func(w io.Writer) error {
		_, err := io.Copy(w, content)
		return err
	})
	if err != nil {
		return nil, err
	}
	want, err := l.DiffID()
	if err != nil {
		return nil, err
	}
	if want != b.Diff {
		return nil, fmt.Errorf("its diffID is %s, and should be %s", b.Diff, want)
	}
	b.media = types.OCILayerZStd
	return b, nil
}

func newZstd(w io.Writer) (io.WriteCloser, error) {
	return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
}

// frames writes what it is given as frames that are decoded each by itself.
type frames struct {
	w       io.Writer
	encoder *zstd.Encoder
	waiting bytes.Buffer
	out     []byte
}

func newFrames(w io.Writer) (io.WriteCloser, error) {
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	return &frames{w: w, encoder: encoder}, err
}

func (f *frames) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), frameBytes-f.waiting.Len())
		f.waiting.Write(rest[:n])
		rest = rest[n:]
		if f.waiting.Len() == frameBytes {
			if err := f.flush(); err != nil {
				return 0, err
			}
		}
	}
	return len(p), nil
}

func (f *frames) flush() error {
	f.out = f.encoder.EncodeAll(f.waiting.Bytes(), f.out[:0])
	f.waiting.Reset()
	_, err := f.w.Write(f.out)
	return err
}

func (f *frames) Close() error {
	if f.waiting.Len() > 0 {
		if err := f.flush(); err != nil {
			return err
		}
	}
	return f.encoder.Close()
}
