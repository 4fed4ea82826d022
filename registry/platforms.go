package registry

import (
	"context"
	"fmt"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxPlatforms is more than any index has images for.
const maxPlatforms = 64

// Platform is an image of those that an index lists.
type Platform struct {
	Name   string        // as in linux/arm64; empty where the reference leads to a manifest at once
	Digest digest.Digest // of the manifest
}

// Platforms lists the images for linux that ref stands for, in the order of its index, or the one that it is. What an index lists
// beside images, such as attestations for a platform "unknown", is left out. Errors are those of Image.
func (c *Client) Platforms(ctx context.Context, ref string) ([]Platform, error) {
	repo, spec, err := c.repository(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("platforms of %s: %w", ref, err)
	}
	data, contentType, err := repo.document(ctx, spec.Object, ocispec.Descriptor{Digest: spec.Digest()})
	if err != nil {
		return nil, fmt.Errorf("platforms of %s: %w", ref, err)
	}
	doc, err := parseManifest(data, contentType)
	if err != nil {
		return nil, fmt.Errorf("platforms of %s: %w", ref, err)
	}
	if !doc.isIndex {
		return []Platform{{Digest: orDigest(spec.Digest(), digest.FromBytes(data).String())}}, nil
	}
	var found []Platform
	for _, d := range doc.index {
		if d.Platform != nil && d.Platform.OS == "linux" && d.Platform.Architecture != "unknown" {
			found = append(found, Platform{Name: platforms.Format(*d.Platform), Digest: d.Digest})
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("platforms of %s: no image for linux: %w", ref, ErrUnsupported)
	case len(found) > maxPlatforms:
		return nil, fmt.Errorf("platforms of %s: %d, more than %d: %w", ref, len(found), maxPlatforms, ErrUnsupported)
	}
	return found, nil
}
