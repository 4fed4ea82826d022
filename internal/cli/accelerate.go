package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

const accelerateLong = `Encodes an image's layers anew, in frames that a node decodes side by side, and attaches them to the image in its registry.

The image itself, its digest, tags and signatures stay as they are; other nodes pull it as before. A node with Hearth takes the
siblings instead, whichever suits its link and its cores, and checks that they unpack to what the image promises. Of an image
for several platforms it is this machine's that is accelerated, unless --platform says otherwise. It wants the right to push to the image's repository, and room
in $TMPDIR for the largest layer. What is there already is not made again.`

const accelerateExample = `  hearth image accelerate 127.0.0.1:5000/hello:1
  hearth image accelerate REF --encoding zstd -o json
  hearth image accelerate REF --platform all`

// allPlatforms is the value of --platform for every image of an index.
const allPlatforms = "all"

// bothEncodings is the value of --encoding for all of them.
const bothEncodings = "both"

// acceleration is one run of accelerate.
type acceleration struct {
	client *registry.Client
	layers *layer.Unpacker
	image  *registry.Image
	wanted []layer.Encoding
	done   atomic.Int64 // bytes of the original layers
}

type acceleratedJSON struct {
	Image     string        `json:"image"`
	Platform  string        `json:"platform,omitempty"` // if it was chosen
	Digest    digest.Digest `json:"digest"`
	Encodings []string      `json:"encodings"` // that were attached now
	Bytes     int64         `json:"bytes"`     // of their layers
	Seconds   float64       `json:"seconds"`
	Already   bool          `json:"already"` // nothing was to be done
}

func (a *app) accelerate() *cobra.Command {
	var out format
	var o registryOptions
	var encoding, platform string
	c := &cobra.Command{
		Use: "accelerate REF", Short: "Attach layers to an image that nodes unpack faster", Long: accelerateLong, Example: accelerateExample,
		Args: takes(1, 1, "the image's REF"),
		RunE: func(c *cobra.Command, args []string) error {
			wanted := []layer.Encoding{layer.EncodingZstd, layer.EncodingLZ4}
			if encoding != bothEncodings {
				if !slices.Contains(wanted, layer.Encoding(encoding)) {
					return usagef("--encoding %q: use zstd, lz4 or both", encoding)
				}
				wanted = []layer.Encoding{layer.Encoding(encoding)}
			}
			client, err := o.client()
			if err != nil {
				return err
			}
			defer client.Close()
			chosen, err := choosePlatforms(c.Context(), client, args[0], platform)
			for _, p := range chosen {
				if err != nil {
					break
				}
				err = a.runAccelerate(c.Context(), client, args[0], p, slices.Clone(wanted), out)
			}
			return explainRegistry(c.Context(), err)
		},
	}
	c.Flags().StringVar(&encoding, "encoding", bothEncodings, "zstd (smaller), lz4 (faster to decode) or both")
	c.Flags().StringVar(&platform, "platform", "", "of an image for several, the one to accelerate, as in linux/arm64, or all, one after the other (default: this machine's)")
	o.add(c.Flags())
	out.add(c.Flags())
	return c
}

// choosePlatforms are the images of a reference that are meant: this machine's if name is empty.
func choosePlatforms(ctx context.Context, client *registry.Client, ref, name string) ([]registry.Platform, error) {
	if name == "" {
		return []registry.Platform{{}}, nil
	}
	all, err := client.Platforms(ctx, ref)
	if err != nil || name == allPlatforms {
		return all, err
	}
	var have []string
	for _, p := range all {
		if p.Name == name {
			return []registry.Platform{p}, nil
		}
		have = append(have, p.Name)
	}
	return nil, fmt.Errorf("image %s has no platform %q: choose %s or one of %q", ref, name, allPlatforms, have)
}

func (a *app) runAccelerate(ctx context.Context, client *registry.Client, ref string, p registry.Platform, wanted []layer.Encoding, out format) error {
	start, what := time.Now(), ref
	if p.Name != "" {
		what += " for " + p.Name
	}
	img, err := client.Image(ctx, ref, p.Digest)
	if err != nil {
		return err
	}
	have, err := client.Siblings(ctx, ref, img.Digest)
	if err != nil {
		return err
	}
	wanted = slices.DeleteFunc(wanted, func(e layer.Encoding) bool { return isAccelerated(img, have, e) })
	result := acceleratedJSON{Image: ref, Platform: p.Name, Digest: img.Digest, Encodings: []string{}, Already: len(wanted) == 0}
	if len(wanted) > 0 {
		unpacker, err := layer.New(layer.Config{})
		if err != nil {
			return err
		}
		run := &acceleration{client: client, layers: unpacker, image: img, wanted: wanted}
		var total int64
		for _, l := range unique(img.Layers) {
			total += l.Size
		}
		err = a.withProgress(what, total, &run.done, func() (err error) {
			result.Bytes, err = run.do(ctx)
			return err
		})
		if err != nil {
			return err
		}
	}
	for _, e := range wanted {
		result.Encodings = append(result.Encodings, string(e))
	}
	result.Seconds = time.Since(start).Seconds()
	if out == formatJSON {
		return a.printJSON(result)
	}
	if result.Already {
		return a.printf("%s is already accelerated\n", what)
	}
	return a.printf("%s is accelerated: %v, %s attached (%.1f s)\n", what, result.Encodings, megabytes(result.Bytes), result.Seconds)
}

// isAccelerated says whether every layer has a sibling.
func isAccelerated(img *registry.Image, have []registry.Sibling, e layer.Encoding) bool {
	for _, l := range img.Layers {
		if !slices.ContainsFunc(have, func(s registry.Sibling) bool {
			return s.Original == l.Digest && s.DiffID == l.DiffID && s.Encoding == string(e) && s.FrameBytes == layer.FrameBytes
		}) {
			return false
		}
	}
	return true
}

// unique gives each layer once; images can have the same layer twice.
func unique(layers []registry.Layer) []registry.Layer {
	var out []registry.Layer
	for _, l := range layers {
		if !slices.ContainsFunc(out, func(o registry.Layer) bool { return o.Digest == l.Digest }) {
			out = append(out, l)
		}
	}
	return out
}

// do encodes and pushes all layers, then attaches them, and gives the size of what it attached.
func (r *acceleration) do(ctx context.Context) (bytes int64, err error) {
	made := map[layer.Encoding][]registry.Sibling{}
	for _, l := range unique(r.image.Layers) {
		siblings, err := r.encode(ctx, l)
		if err != nil {
			return 0, err
		}
		for e, s := range siblings {
			made[e] = append(made[e], s)
			bytes += s.Size
		}
	}
	for _, e := range r.wanted {
		if err := r.client.AttachSiblings(ctx, r.image, string(e), made[e]); err != nil {
			return 0, err
		}
	}
	return bytes, nil
}

// encode makes a layer's siblings, all from one reading of it, and pushes them once the tar is known to be right.
func (r *acceleration) encode(ctx context.Context, l registry.Layer) (map[layer.Encoding]registry.Sibling, error) {
	var outputs []*output
	var writers []io.Writer
	defer func() {
		for _, o := range outputs {
			o.discard()
		}
	}()
	for _, e := range r.wanted {
		o, err := newOutput(e)
		if err != nil {
			return nil, fmt.Errorf("encode layer %s: %w", l.Digest, err)
		}
		outputs, writers = append(outputs, o), append(writers, o.encoder)
	}
	src, err := r.client.Open(ctx, r.image.Ref, l)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	spec := layer.Spec{Digest: l.Digest, DiffID: l.DiffID, Size: l.Size, MediaType: l.MediaType}
	size, err := r.layers.Decompress(ctx, &countingReader{src, &r.done}, spec, io.MultiWriter(writers...))
	if err != nil {
		return nil, err
	}
	siblings := map[layer.Encoding]registry.Sibling{}
	for _, o := range outputs {
		desc, err := o.finish()
		if err != nil {
			return nil, fmt.Errorf("encode layer %s: %w", l.Digest, err)
		}
		if _, err := r.client.PutBlob(ctx, r.image.Ref, desc, o.file); err != nil {
			return nil, err
		}
		siblings[o.encoding] = registry.Sibling{
			Layer:    registry.Layer{Digest: desc.Digest, DiffID: l.DiffID, Size: desc.Size, MediaType: desc.MediaType},
			Original: l.Digest, Encoding: string(o.encoding), Bytes: size, FrameBytes: layer.FrameBytes,
		}
	}
	return siblings, nil
}

// output is a sibling's blob in the making. Its file has no name, so that nothing is left of it whatever happens.
type output struct {
	encoding layer.Encoding
	encoder  *layer.Encoder
	file     *os.File
	sum      digest.Digester
}

func newOutput(e layer.Encoding) (*output, error) {
	f, err := os.CreateTemp("", "hearth-accelerate-")
	if err != nil {
		return nil, err
	}
	o := &output{encoding: e, file: f, sum: digest.Canonical.Digester()}
	err = os.Remove(f.Name())
	if err == nil {
		o.encoder, err = layer.NewEncoder(io.MultiWriter(f, o.sum.Hash()), e)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return o, nil
}

// finish ends the blob.
func (o *output) finish() (ocispec.Descriptor, error) {
	if err := o.encoder.Close(); err != nil {
		return ocispec.Descriptor{}, err
	}
	info, err := o.file.Stat()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: registry.SiblingMediaType(string(o.encoding)), Digest: o.sum.Digest(), Size: info.Size()}, nil
}

func (o *output) discard() {
	o.encoder.Abort()
	_ = o.file.Close()
}

// countingReader adds up what is read.
type countingReader struct {
	io.Reader
	count *atomic.Int64
}

// Read implements io.Reader.
func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.count.Add(int64(n))
	return n, err
}
