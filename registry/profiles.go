package registry

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What a profile artifact is made of: a manifest of this type, whose subject is the image's manifest, with one layer of the same type.
const (
	profileType = "application/vnd.hearth.profile.v2"

	// MaxProfileBytes bounds a profile, as package prefetch does.
	MaxProfileBytes = 64 << 10
	// maxProfiles are read of those of an image: each has in it what its node had learnt from others.
	maxProfiles = 4

	annotationStarts   = "dev.hearth.profile.starts"
	annotationPlatform = "dev.hearth.profile.platform"
	annotationNode     = "dev.hearth.profile.node"
)

// profileArtifacts come from any number of nodes.
var profileArtifacts = artifacts{kind: profileType, listed: 64, read: maxProfiles, bytes: MaxProfileBytes}

// Profile is what starts of an image have read, as package prefetch encodes it. Here it is bytes.
type Profile struct {
	Data    []byte
	Created time.Time
	Starts  int // that it was learnt from
	// Platform is the image's, as in linux/amd64.
	Platform string
	// Node is where it was recorded; "build" if it was on purpose, before anybody has run the image.
	Node string
}

// Profiles are the newest that were attached to an image's manifest, at most four, the newest first. Anyone who may push to the
// repository can attach some: they are hints. Those that make no sense are left out.
func (c *Client) Profiles(ctx context.Context, ref string, manifest digest.Digest) ([]Profile, error) {
	repo, _, err := c.repository(ctx, ref)
	var found []Profile
	if err == nil {
		found, err = repo.profiles(ctx, manifest)
	}
	if err != nil {
		return nil, fmt.Errorf("profiles of %s: %w", ref, err)
	}
	return found, nil
}

func (r *repository) profiles(ctx context.Context, manifest digest.Digest) ([]Profile, error) {
	read, err := r.documents(ctx, manifest, profileArtifacts)
	faults := []error{err}
	var found []Profile
	for _, data := range read {
		p, blob, ok := parseProfile(data, manifest)
		if !ok {
			continue
		}
		if p.Data, err = r.blob(ctx, blob, MaxProfileBytes); err != nil {
			faults = append(faults, err)
			continue
		}
		found = append(found, p)
	}
	if len(found) > 0 {
		return found, nil
	}
	return nil, errors.Join(faults...)
}

// parseProfile reads the manifest of a profile artifact. blob is where the profile is.
func parseProfile(data []byte, subject digest.Digest) (p Profile, blob ocispec.Descriptor, ok bool) {
	var m ocispec.Manifest
	if json.Unmarshal(data, &m) != nil || m.Subject == nil || m.Subject.Digest != subject || len(m.Layers) != 1 || validateAll(m.Layers...) != nil {
		return p, blob, false
	}
	blob = m.Layers[0]
	if blob.MediaType != profileType || blob.Size <= 0 || blob.Size > MaxProfileBytes {
		return p, blob, false
	}
	starts, err1 := strconv.Atoi(m.Annotations[annotationStarts])
	created, err2 := time.Parse(time.RFC3339, m.Annotations[ocispec.AnnotationCreated])
	p = Profile{Created: created, Starts: starts, Platform: m.Annotations[annotationPlatform], Node: m.Annotations[annotationNode]}
	return p, blob, errors.Join(err1, err2) == nil && starts > 0 && len(p.Platform) <= 64 && len(p.Node) <= 253
}

// AttachProfile attaches a profile to an image, which itself stays as it is.
func (c *Client) AttachProfile(ctx context.Context, img *Image, p Profile) error {
	if len(p.Data) == 0 || len(p.Data) > MaxProfileBytes || p.Starts <= 0 {
		return fmt.Errorf("attach profile to %s: %d bytes of %d starts: %w", img.Ref, len(p.Data), p.Starts, ErrSize)
	}
	m := artifact(img, profileType, map[string]string{
		ocispec.AnnotationCreated: p.Created.UTC().Format(time.RFC3339), annotationStarts: strconv.Itoa(p.Starts),
		annotationPlatform: p.Platform, annotationNode: cmp.Or(p.Node, "build"),
	})
	blob := ocispec.Descriptor{MediaType: profileType, Digest: digest.FromBytes(p.Data), Size: int64(len(p.Data))}
	m.Layers = []ocispec.Descriptor{blob}
	_, err := c.PutBlob(ctx, img.Ref, blob, bytes.NewReader(p.Data))
	if err == nil {
		err = c.attach(ctx, img, m, profileArtifacts)
	}
	if err != nil {
		return fmt.Errorf("attach profile to %s: %w", img.Ref, err)
	}
	return nil
}
