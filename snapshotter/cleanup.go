package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// Remove forgets a snapshot. Its directory goes with the next Cleanup, which containerd's garbage collection calls.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	return s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		if _, _, err := storage.Remove(ctx, key); err != nil {
			return fmt.Errorf("remove snapshot %s: %w", key, err)
		}
		return nil
	})
}

// Cleanup frees the space of removed snapshots, and of layers that no snapshot uses any more.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	// What was swept before a sweep failed is deleted: it may be what the sweep had no room for.
	if err := errors.Join(s.sweep(ctx), emptyTrash(s.cfg.Root)); err != nil {
		return fmt.Errorf("clean up snapshots: %w", err)
	}
	return nil
}

// sweepQuietly frees layers whose pull was given up.
func (s *Snapshotter) sweepQuietly(ctx context.Context) {
	if err := s.Cleanup(ctx); err != nil {
		s.log.Warn("clean up after a pull that was given up", "error", err)
	}
}

// sweep moves what metadata does not know, and the trees that no snapshot points to, to the trash. A writing transaction keeps
// everyone from making new snapshots meanwhile; trees on their way to become one are pinned.
func (s *Snapshotter) sweep(ctx context.Context) error {
	return s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) { // a new database has no bucket
			return err
		}
		dir := filepath.Join(s.cfg.Root, "snapshots")
		names, err := readNames(dir)
		if err != nil {
			return err
		}
		used := map[string]bool{}
		for _, name := range names {
			if _, known := ids[name]; !known {
				if err := discard(s.cfg.Root, filepath.Join(dir, name)); err != nil {
					return err
				}
				continue
			}
			tree, err := treeOf(filepath.Join(dir, name, "fs"))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if tree != "" {
				used[tree] = true
			}
		}
		return s.trees.sweep(used)
	})
}
