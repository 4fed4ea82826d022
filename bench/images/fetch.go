package images

import (
	"context"
	"fmt"
	"runtime"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Fetch returns a layout of an image that a registry has, for this machine's architecture, with Docker's credentials for it. It is
// cached under a name of the caller's as images are (see Build), by the digest that ref has now.
func Fetch(ctx context.Context, cfg Config, as, ref string) (layoutPath string, err error) {
	source, err := name.ParseReference(ref)
	if err != nil {
		return "", fmt.Errorf("fetch image: %w", err)
	}
	image, err := remote.Image(source, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	if err != nil {
		return "", fmt.Errorf("fetch %s: %w", ref, err)
	}
	digest, err := image.Digest()
	if err != nil {
		return "", fmt.Errorf("fetch %s: %w", ref, err)
	}
	b, err := newBuilder(cfg)
	if err != nil {
		return "", fmt.Errorf("fetch %s: %w", ref, err)
	}
	layoutPath, err = b.cached(ctx, as, key(digest), func(dir string) error {
		return b.step(as, "fetch "+ref, func() error {
			path, err := layout.Write(dir, empty.Index)
			if err != nil {
				return err
			}
			return path.AppendImage(image)
		})
	})
	if err != nil {
		return "", fmt.Errorf("fetch %s: %w", ref, err)
	}
	return layoutPath, nil
}
