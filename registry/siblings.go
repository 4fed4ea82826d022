package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What a sibling artifact is made of: a manifest of this type, whose subject is the image's manifest and whose layers are the
// image's layers in another encoding, annotated with what they stand for.
const (
	siblingType = "application/vnd.hearth.accelerated.v1+json"
	// siblingLayerType is what an encoding is added to; zstd has OCI's own.
	siblingLayerType = "application/vnd.hearth.layer.v1.tar+"

	// maxSiblings bounds those of an image; an image rarely has more than a hundred layers.
	maxSiblings = 512

	annotationEncoding = "dev.hearth.encoding"
	annotationOriginal = "dev.hearth.layer.digest"
	annotationDiffID   = "dev.hearth.layer.diffid"
	annotationBytes    = "dev.hearth.layer.bytes"
	annotationFrame    = "dev.hearth.layer.frame-bytes"
)

// siblingArtifacts are two for each time that an image was accelerated; each may have as many layers as an image.
var siblingArtifacts = artifacts{kind: siblingType, listed: 16, read: 16, bytes: maxManifestBytes}

// Sibling is a layer of an image in another encoding, of the same tar.
type Sibling struct {
	Layer                  // the sibling's own blob; the DiffID is the original's
	Original digest.Digest // the layer's blob in the image
	Encoding string
	Bytes    int64 // of the tar
	// FrameBytes is how much of the tar each frame of the blob has.
	FrameBytes int64
}

// Siblings lists the siblings that were attached to an image's manifest. Anyone who may push to the repository can attach some:
// what they unpack to has to be checked against the image's own diffIDs. Those that make no sense are left out.
func (c *Client) Siblings(ctx context.Context, ref string, manifest digest.Digest) ([]Sibling, error) {
	repo, _, err := c.repository(ctx, ref)
	var found []Sibling
	if err == nil {
		found, err = repo.siblings(ctx, manifest)
	}
	if err != nil {
		return nil, fmt.Errorf("siblings of %s: %w", ref, err)
	}
	return found, nil
}

func (r *repository) siblings(ctx context.Context, manifest digest.Digest) ([]Sibling, error) {
	read, err := r.documents(ctx, manifest, siblingArtifacts)
	var found []Sibling
	for _, data := range read {
		found = append(found, parseSiblings(data, manifest)...)
	}
	if len(found) > 0 {
		return slices.Clip(found[:min(len(found), maxSiblings)]), nil
	}
	return nil, err
}

// parseSiblings reads the manifest of a sibling artifact.
func parseSiblings(data []byte, subject digest.Digest) []Sibling {
	var m ocispec.Manifest
	if json.Unmarshal(data, &m) != nil || m.Subject == nil || m.Subject.Digest != subject || validateAll(m.Layers...) != nil {
		return nil
	}
	var found []Sibling
	for _, l := range m.Layers {
		if s, ok := parseSibling(l, m.Annotations[annotationEncoding]); ok {
			found = append(found, s)
		}
	}
	return found
}

func parseSibling(l ocispec.Descriptor, encoding string) (Sibling, bool) {
	original, err1 := digest.Parse(l.Annotations[annotationOriginal])
	diffID, err2 := digest.Parse(l.Annotations[annotationDiffID])
	size, err3 := strconv.ParseInt(l.Annotations[annotationBytes], 10, 64)
	frame, err4 := strconv.ParseInt(l.Annotations[annotationFrame], 10, 64)
	if errors.Join(err1, err2, err3, err4) != nil || size <= 0 || frame <= 0 || l.Size <= 0 || encoding == "" || len(encoding) > 32 {
		return Sibling{}, false
	}
	return Sibling{
		Layer:    Layer{Digest: l.Digest, DiffID: diffID, Size: l.Size, MediaType: l.MediaType},
		Original: original, Encoding: encoding, Bytes: size, FrameBytes: frame,
	}, true
}

// AttachSiblings attaches siblings of one encoding to an image, which itself stays as it is. Their blobs are in the repository
// already. Attaching the same again changes nothing.
func (c *Client) AttachSiblings(ctx context.Context, img *Image, encoding string, siblings []Sibling) error {
	m := artifact(img, siblingType, map[string]string{annotationEncoding: encoding})
	for _, s := range siblings {
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: s.MediaType, Digest: s.Digest, Size: s.Size,
			Annotations: map[string]string{
				annotationOriginal: s.Original.String(), annotationDiffID: s.DiffID.String(),
				annotationBytes: strconv.FormatInt(s.Bytes, 10), annotationFrame: strconv.FormatInt(s.FrameBytes, 10),
			},
		})
	}
	if err := c.attach(ctx, img, m, siblingArtifacts); err != nil {
		return fmt.Errorf("attach siblings to %s: %w", img.Ref, err)
	}
	return nil
}

// SiblingMediaType is the media type of layers in an encoding.
func SiblingMediaType(encoding string) string {
	if encoding == "zstd" {
		return ocispec.MediaTypeImageLayerZstd
	}
	return siblingLayerType + encoding
}
