package snapshotter

import (
	"context"
	"fmt"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/hearth-serverless/hearth/registry"
)

// Fetch brings the layers of an image before containerd is asked to pull it, and returns when all are here. containerd holds a
// lock while a Prepare of ours waits for a layer; if its garbage collection wants that lock meanwhile, every other Prepare on the
// node waits too. After a Fetch no Prepare of the image has anything to wait for. It is an offer: whatever goes wrong here comes up
// again in the pull, which says it better.
func (s *Snapshotter) Fetch(ctx context.Context, imageRef string) error {
	named, err := reference.ParseDockerRef(imageRef)
	if err != nil {
		return fmt.Errorf("image %q: %w", imageRef, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.PrepareTimeout, errDeadline)
	defer cancel()
	if s.cfg.Blobs != nil {
		held, err := s.cfg.Blobs.Hold(ctx)
		if err != nil {
			return fmt.Errorf("fetch image %s: %w", imageRef, err) // the pull, which has a lease, keeps its blobs
		}
		ctx = held
	}
	se, err := s.sessions.open(ctx, sessionKey{ref: named.String()})
	if err != nil {
		return fmt.Errorf("fetch image %s: %w", imageRef, err)
	}
	defer s.sessions.close(ctx, se)
	if err := await(ctx, se.resolved); err != nil {
		return fmt.Errorf("fetch image %s: %w", imageRef, err)
	}
	if se.err != nil {
		return fmt.Errorf("fetch image %s: %w", imageRef, se.err)
	}
	for _, j := range s.sessions.held(se) {
		if err := await(ctx, j.done); err != nil {
			return fmt.Errorf("fetch image %s: %w", imageRef, err)
		}
		if j.err != nil {
			return fmt.Errorf("fetch image %s: layer %s: %w", imageRef, j.layer.Digest, j.err)
		}
	}
	whole, err := s.whole(ctx, se.image)
	if err != nil {
		return fmt.Errorf("fetch image %s: %w", imageRef, err)
	}
	if whole { // no Prepare for its layers will come that could say so
		s.sessions.fulfil(se)
	}
	return nil
}

// whole says whether all of an image's snapshots are there, so that no layer needs to be held for them.
func (s *Snapshotter) whole(ctx context.Context, img *registry.Image) (whole bool, err error) {
	chains := make([]digest.Digest, len(img.Layers))
	for i, l := range img.Layers {
		chains[i] = l.DiffID
	}
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		parent := ""
		for _, chain := range identity.ChainIDs(chains) { // in place
			if parent, whole = committed(ctx, &request{target: &target{chain: chain}, parent: parent}); !whole {
				return nil
			}
		}
		return nil
	})
	return whole, err
}
