package snapshotter

import (
	"context"
	"fmt"

	"github.com/distribution/reference"
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
	return nil
}
