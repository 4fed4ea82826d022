package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

// takeAttempts bounds how often a tree with implicit directories may go to other chains before this one gets it.
const takeAttempts = 8

// bring waits for a layer's job and commits what it made.
func (s *Snapshotter) bring(ctx context.Context, r request, se *session, l registry.Layer) error {
	for range takeAttempts {
		if done, err := s.commitPresent(ctx, r, se); done {
			return err
		}
		j, err := s.sessions.job(ctx, se, l)
		if err != nil {
			return classify(err, "internal")
		}
		if err := await(ctx, j.done); err != nil {
			return classify(err, "fetch")
		}
		se.trace.addJob(j) // a tree with implicit directories is dropped before it is committed
		if j.err != nil {
			s.sessions.drop(se, j) // the next pull tries again
			return classify(fmt.Errorf("layer %s of %s: %w", l.Digest, r.image, j.err), "fetch")
		}
		if j.staged == "" {
			continue // published: commitPresent finds it
		}
		taken := s.jobs.take(j)
		if taken {
			err = s.adopt(r, se, j)
		}
		s.sessions.drop(se, j)
		if err != nil {
			return err
		}
	}
	return &fallback{"internal", fmt.Errorf("layer %s: other images take it away each time", l.Digest)}
}

// adopt gives the implicit directories of a job's tree, which is ours, what they have in the layers below, and publishes it for
// this chain only.
func (s *Snapshotter) adopt(r request, se *session, j *job) (err error) {
	defer func() {
		if err != nil {
			wipe(s.cfg.Logger, j.staged)
		}
	}()
	tree := filepath.Join(j.staged, "fs")
	if image, ok := imageOf(j.staged); ok {
		tree = image
	}
	for _, parent := range r.parents {
		if name, err := treeOf(parent); err != nil {
			return classify(err, "internal")
		} else if name != "" {
			if _, err := s.trees.ready(name); err != nil {
				return classify(err, "internal")
			}
		}
	}
	if err := linkInTheWay(j.result.ImplicitDirs, r.parents); err != nil {
		return &fallback{"implicit_link", fmt.Errorf("layer %s: %w", j.layer.Digest, err)}
	}
	if len(r.parents) > 0 {
		if err := j.result.AdoptImplicitDirs(tree, r.parents); err != nil {
			return classify(fmt.Errorf("layer %s: %w", j.layer.Digest, err), "internal")
		}
		start := time.Now()
		if err := s.syncer.tree(j.staged); err != nil {
			return classify(err, "internal")
		}
		se.trace.add(phaseSync, start, time.Now())
	}
	if err := s.trees.publish(j.staged, treeName(r.diffID, r.chain), j.info); err != nil {
		return classify(err, "internal")
	}
	return nil
}

// linkInTheWay finds an implicit directory that is a symbolic link in a layer below. containerd would unpack through that link;
// a tree on its own replaces it by a directory.
func linkInTheWay(implicit, parents []string) error {
	for _, dir := range implicit {
		for _, parent := range parents {
			st, err := os.Lstat(filepath.Join(parent, dir)) // its own parents are implicit, and were seen before, or were made by the layer
			if err != nil {
				continue
			}
			if st.Mode()&os.ModeSymlink != 0 {
				return fmt.Errorf("%s is a symbolic link in a layer below", dir)
			}
			break // what is further below is hidden
		}
	}
	return nil
}

// await waits for done, or for the end of ctx.
func await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// fallback says why containerd should pull a layer itself. Nothing of ours is left when it is returned.
type fallback struct {
	reason string // the metric's label
	err    error
}

func (f *fallback) Error() string { return f.reason + ": " + f.err.Error() }
func (f *fallback) Unwrap() error { return f.err }

// errPlain is the fallback when there is nothing to fall back from: the labels do not say where the layer is.
var errPlain = errors.New("labels do not name the layer's image")

// classify decides whether a failure is an answer or a reason to fall back; reason is used if the error does not tell a better one.
func classify(err error, reason string) error {
	switch {
	case errors.Is(err, layer.ErrCorrupt), errors.Is(err, errTruncated):
		return fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss) // never: it could hide what is wrong
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted) // containerd has no more space than we
	case errors.Is(err, errClosed):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	case errors.Is(err, layer.ErrUnsupported):
		return &fallback{"unsupported", err}
	case errors.Is(err, layer.ErrTooLarge):
		return &fallback{"memory", err}
	case errors.Is(err, errDeadline):
		return &fallback{"deadline", err}
	case errors.Is(err, errStalled):
		return &fallback{"stalled", err}
	case errors.Is(err, registry.ErrUnauthorized):
		return &fallback{"unauthorized", err}
	case errors.Is(err, registry.ErrNotFound):
		return &fallback{"not_found", err}
	default:
		return &fallback{reason, err}
	}
}
