package registry

import (
	"context"
	_ "crypto/sha256" // digests
	_ "crypto/sha512"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxManifestBytes = 4 << 20
	maxConfigBytes   = 8 << 20
	maxIndexDepth    = 4 // an index may name an index
)

// Image is a manifest for this node's platform: what to fetch, and what the
// unpacked layers must hash to.
type Image struct {
	Ref       string        // as it was asked for
	Digest    digest.Digest // of the manifest, not of an index above it
	MediaType string        // of the manifest
	Size      int64         // of the manifest
	Layers    []Layer       // lowest first
}

// ChainID names what the layers are together when they are unpacked (OCI image specification): the same for every image that has them.
func (i *Image) ChainID() digest.Digest {
	diffIDs := make([]digest.Digest, len(i.Layers))
	for n, l := range i.Layers {
		diffIDs[n] = l.DiffID
	}
	return identity.ChainID(diffIDs)
}

// Layer is a blob of an image. MediaType tells the compression, or is trusted no
// further than a hint by those who look at the bytes.
type Layer struct {
	Digest    digest.Digest // of the blob, as it is transferred
	DiffID    digest.Digest // of the uncompressed tar
	Size      int64         // of the blob
	MediaType string
}

// Image resolves ref, in any form that containerd or docker accepts, to the
// image for linux and this GOARCH. If dgst is not empty it names the index or
// manifest to read, and ref's tag is not looked up; else a digest in ref does.
// Everything read is verified against its digest.
//
// Errors: ErrNotFound, ErrUnauthorized, ErrUnsupported (no such platform, not a
// container image, foreign layers), ErrSize, ErrDigest, ErrProtocol, or what
// broke the connection.
func (c *Client) Image(ctx context.Context, ref string, dgst digest.Digest) (*Image, error) {
	img, err := c.image(ctx, ref, dgst)
	if err != nil {
		return nil, fmt.Errorf("resolve image %s: %w", ref, err)
	}
	return img, nil
}

func (c *Client) image(ctx context.Context, ref string, dgst digest.Digest) (*Image, error) {
	repo, spec, err := c.repository(ctx, ref)
	if err != nil {
		return nil, err
	}
	if dgst == "" {
		dgst = spec.Digest()
	}
	m, err := repo.manifest(ctx, spec.Object, dgst)
	if err != nil {
		return nil, err
	}
	data, err := repo.blob(ctx, m.config, maxConfigBytes)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	diffIDs, err := parseConfig(data)
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", m.config.Digest, err)
	}
	layers, err := pairLayers(m.layers, diffIDs)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", m.digest, err)
	}
	return &Image{Ref: ref, Digest: m.digest, MediaType: m.mediaType, Size: m.size, Layers: layers}, nil
}

// manifest reads the document that tag or dgst names, and follows indexes down
// to the manifest for this platform.
func (r *repository) manifest(ctx context.Context, tag string, dgst digest.Digest) (*manifest, error) {
	want := ocispec.Descriptor{Digest: dgst}
	for range maxIndexDepth {
		data, contentType, err := r.document(ctx, tag, want)
		if err != nil {
			return nil, err
		}
		doc, err := parseManifest(data, contentType)
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", orDigest(want.Digest, tag), err)
		}
		if !doc.isIndex {
			doc.digest, doc.size = orDigest(want.Digest, digest.FromBytes(data).String()), int64(len(data))
			return doc, nil
		}
		if want, err = choosePlatform(doc.index); err != nil {
			return nil, fmt.Errorf("index %s: %w", orDigest(dgst, tag), err)
		}
	}
	return nil, fmt.Errorf("indexes nest deeper than %d: %w", maxIndexDepth, ErrUnsupported)
}

func orDigest(d digest.Digest, other string) digest.Digest {
	if d != "" {
		return d
	}
	return digest.Digest(other)
}

// document reads a manifest or index, by tag only if want has no digest.
func (r *repository) document(ctx context.Context, tag string, want ocispec.Descriptor) ([]byte, string, error) {
	object, caps := tag, docker.HostCapabilityPull|docker.HostCapabilityResolve
	if want.Digest != "" {
		object, caps = want.Digest.String(), docker.HostCapabilityPull
	}
	header := http.Header{"Accept": {manifestTypes}}
	return r.small(ctx, "manifests", object, want, maxManifestBytes, caps, header)
}

// blob reads a small blob, such as a config, as a whole.
func (r *repository) blob(ctx context.Context, want ocispec.Descriptor, limit int64) ([]byte, error) {
	if want.Size > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d: %w", want.Digest, want.Size, limit, ErrSize)
	}
	data, _, err := r.small(ctx, "blobs", want.Digest.String(), want, limit, docker.HostCapabilityPull, nil)
	return data, err
}

// small reads something into memory, at most limit bytes. It verifies the digest
// and, where it is known, the size that want names.
func (r *repository) small(ctx context.Context, kind, object string, want ocispec.Descriptor, limit int64,
	caps docker.HostCapabilities, header http.Header) (data []byte, contentType string, err error) {
	if want.Digest != "" {
		if err := want.Digest.Validate(); err != nil {
			return nil, "", fmt.Errorf("digest %q: %w", want.Digest, err)
		}
	}
	var from atomic.Int32
	err = r.each(ctx, r.with(caps), &from, func(ctx context.Context, at site) (int64, error) {
		right, err := at.acquire(ctx, true, at.last)
		if err != nil {
			return 0, err
		}
		defer right.park()
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		resp, err := r.get(ctx, at, kind, object, header)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		contentType = resp.Header.Get("Content-Type")
		body := watch(ctx, cancel, resp.Body, r.client.cfg.StallTimeout)
		data, err = readSmall(resp, body, want, limit)
		return 0, err
	})
	return data, contentType, err
}

// readSmall reads and verifies the body of resp.
func readSmall(resp *http.Response, body io.Reader, want ocispec.Descriptor, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", safeURL(resp.Request.URL), err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes: %w", safeURL(resp.Request.URL), limit, ErrSize)
	}
	if want.Size > 0 && int64(len(data)) != want.Size {
		return nil, fmt.Errorf("%s has %d bytes, descriptor %d: %w", safeURL(resp.Request.URL), len(data), want.Size, ErrSize)
	}
	if want.Digest == "" {
		want.Digest = digest.Digest(resp.Header.Get("Docker-Content-Digest"))
		if want.Digest.Validate() != nil {
			return data, nil // by tag, and no usable promise: the registry is trusted
		}
	}
	if got := want.Digest.Algorithm().FromBytes(data); got != want.Digest {
		return nil, fmt.Errorf("%s is %s, not %s: %w", safeURL(resp.Request.URL), got, want.Digest, ErrDigest)
	}
	return data, nil
}
