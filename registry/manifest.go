package registry

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's own media types. OCI's are in ocispec.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerSchema1  = "application/vnd.docker.distribution.manifest.v1+"
	dockerConfigV1 = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeign  = "application/vnd.docker.image.rootfs.foreign."
	ociLayer       = "application/vnd.oci.image.layer.v1.tar"
	ociForeign     = "application/vnd.oci.image.layer.nondistributable."
)

// manifestTypes is the Accept header for any document that parseManifest reads.
const manifestTypes = ocispec.MediaTypeImageManifest + ", " + ocispec.MediaTypeImageIndex + ", " + dockerManifest + ", " + dockerList + ", */*"

// manifest is either an index or an image manifest.
type manifest struct {
	digest    digest.Digest
	mediaType string // of an image
	size      int64
	isIndex   bool
	index     []ocispec.Descriptor // of an index
	config    ocispec.Descriptor   // of an image
	layers    []ocispec.Descriptor // of an image
}

// document is what a manifest or index may have in it.
type document struct {
	MediaType string               `json:"mediaType"`
	Manifests json.RawMessage      `json:"manifests"`
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	FSLayers  json.RawMessage      `json:"fsLayers"`
}

// parseManifest reads a manifest or index. Its fields say what it is, and its
// mediaType or else its Content-Type must not say otherwise. A document that
// could be read as both is refused: tools must not see different images under
// one digest (CVE-2021-41190).
func parseManifest(data []byte, contentType string) (*manifest, error) {
	var doc document
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if doc.MediaType == "" {
		doc.MediaType, _, _ = strings.Cut(contentType, ";")
	}
	isIndex, isImage := doc.Manifests != nil, doc.Config != nil || doc.Layers != nil
	switch {
	case doc.FSLayers != nil || strings.HasPrefix(doc.MediaType, dockerSchema1):
		return nil, fmt.Errorf("docker schema 1, push the image again with a current tool: %w", ErrUnsupported)
	case isIndex && isImage:
		return nil, fmt.Errorf("both an index and a manifest: %w", ErrUnsupported)
	case isIndex:
		return doc.asIndex()
	case isImage:
		return doc.asImage()
	}
	return nil, doc.unsupported()
}

func (d *document) asIndex() (*manifest, error) {
	if d.MediaType == ocispec.MediaTypeImageManifest || d.MediaType == dockerManifest {
		return nil, d.unsupported()
	}
	m := &manifest{isIndex: true}
	if err := json.Unmarshal(d.Manifests, &m.index); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return m, validateAll(m.index...)
}

func (d *document) asImage() (*manifest, error) {
	if d.Config == nil || d.MediaType == ocispec.MediaTypeImageIndex || d.MediaType == dockerList {
		return nil, d.unsupported()
	}
	if err := validateConfigType(d.Config.MediaType); err != nil {
		return nil, err
	}
	m := &manifest{mediaType: cmp.Or(d.MediaType, ocispec.MediaTypeImageManifest), config: *d.Config, layers: d.Layers}
	return m, errors.Join(validateAll(m.config), validateAll(m.layers...))
}

func (d *document) unsupported() error {
	return fmt.Errorf("neither an image manifest nor an index (media type %q): %w", d.MediaType, ErrUnsupported)
}

func validateConfigType(t string) error {
	if t == ocispec.MediaTypeImageConfig || t == dockerConfigV1 {
		return nil
	}
	return fmt.Errorf("config of media type %q is not a container image's: %w", t, ErrUnsupported)
}

func validateAll(descs ...ocispec.Descriptor) error {
	for _, d := range descs {
		if err := d.Digest.Validate(); err != nil {
			return fmt.Errorf("descriptor %q: %w: %w", d.Digest, ErrProtocol, err)
		}
		if d.Size < 0 {
			return fmt.Errorf("descriptor %s: size %d: %w", d.Digest, d.Size, ErrSize)
		}
	}
	return nil
}

// choosePlatform returns the entry for linux on this architecture, the best if
// there are several. An index of one entry without a platform is that entry.
func choosePlatform(index []ocispec.Descriptor) (ocispec.Descriptor, error) {
	match := platforms.Only(ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH})
	var best *ocispec.Descriptor
	var have []string
	for i, d := range index {
		if d.Platform == nil {
			continue
		}
		have = append(have, platforms.Format(*d.Platform))
		if match.Match(*d.Platform) && (best == nil || match.Less(*d.Platform, *best.Platform)) {
			best = &index[i]
		}
	}
	if best == nil && len(index) == 1 && index[0].Platform == nil {
		best = &index[0]
	}
	if best == nil {
		return ocispec.Descriptor{}, fmt.Errorf("no image for linux/%s among %q: %w", runtime.GOARCH, have[:min(len(have), 16)], ErrUnsupported)
	}
	return *best, nil
}

// parseConfig returns the diffIDs of an image config.
func parseConfig(data []byte) ([]digest.Digest, error) {
	var cfg struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(data, &cfg); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	for _, d := range cfg.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return nil, fmt.Errorf("diffID %q: %w: %w", d, ErrProtocol, err)
		}
	}
	return cfg.RootFS.DiffIDs, nil
}

// pairLayers joins what a manifest and its config say about the same layers.
func pairLayers(descs []ocispec.Descriptor, diffIDs []digest.Digest) ([]Layer, error) {
	if len(descs) != len(diffIDs) {
		return nil, fmt.Errorf("%d layers, but the config has %d diffIDs: %w", len(descs), len(diffIDs), ErrProtocol)
	}
	layers := make([]Layer, len(descs))
	for i, d := range descs {
		if err := validateLayerType(d.MediaType); err != nil {
			return nil, fmt.Errorf("layer %s: %w", d.Digest, err)
		}
		layers[i] = Layer{Digest: d.Digest, DiffID: diffIDs[i], Size: d.Size, MediaType: d.MediaType}
	}
	return layers, nil
}

// validateLayerType accepts tars under any compression: package layer knows
// which it can read.
func validateLayerType(t string) error {
	if strings.HasPrefix(t, dockerForeign) || strings.HasPrefix(t, ociForeign) {
		return fmt.Errorf("foreign layer (%s), its bytes are not in the registry: %w", t, ErrUnsupported)
	}
	for _, tar := range []string{ociLayer, dockerLayer} {
		rest, ok := strings.CutPrefix(t, tar)
		if ok && (rest == "" || rest == ".gzip" || rest == ".zstd" || rest[0] == '+') {
			return nil
		}
	}
	return fmt.Errorf("media type %q is not a layer's: %w", t, ErrUnsupported)
}
