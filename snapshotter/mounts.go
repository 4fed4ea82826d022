package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
)

// prepareRoot makes the directories, on a file system that can hold overlays.
func prepareRoot(root string) error {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	for _, dir := range []string{"snapshots", "layers", "staging", "trash"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o700); err != nil && !os.IsExist(err) {
			return err
		}
	}
	ok, err := fs.SupportsDType(root)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%s: the file system does not support d_type; format xfs with ftype=1, or use ext4", root)
	}
	return nil
}

// overlayOptions are the options of every overlay mount on this machine. In a user namespace overlayfs wants the option userxattr,
// and then does not understand the attributes that mark the directories of layers as opaque.
func overlayOptions() ([]string, error) {
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return nil, fmt.Errorf("look for a user namespace: %w", err)
	}
	if fields := strings.Fields(string(ids)); len(fields) != 3 || fields[2] != "4294967295" || os.Geteuid() != 0 {
		return nil, errors.New("overlayfs mounts need root in the machine's own user namespace")
	}
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		return []string{"index=off"}, nil
	}
	return nil, nil
}

// create makes an ordinary snapshot.
func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	var sn storage.Snapshot
	var dir string
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if sn, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return fmt.Errorf("create snapshot: %w", err)
		}
		dir = s.snapshotPath(sn.ID)
		return s.makeSnapshotDir(dir, sn)
	})
	if err != nil {
		if dir != "" {
			err = errors.Join(err, discard(s.cfg.Root, dir))
		}
		return nil, err
	}
	mounts, err := s.mounts(sn)
	if err != nil {
		return nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
	}
	return mounts, nil
}

// makeSnapshotDir makes a snapshot's directories. Their root belongs to whom the parent's root belongs to, as in an overlay the
// upper directory is what shows.
func (s *Snapshotter) makeSnapshotDir(dir string, sn storage.Snapshot) error {
	if err := discard(s.cfg.Root, dir); err != nil { // of a transaction that was rolled back
		return err
	}
	if err := makeDir(dir, 0o700); err != nil {
		return err
	}
	upper := filepath.Join(dir, "fs")
	if err := makeDir(upper, 0o755); err != nil {
		return err
	}
	if sn.Kind == snapshots.KindActive {
		if err := makeDir(filepath.Join(dir, "work"), 0o711); err != nil {
			return err
		}
	}
	if len(sn.ParentIDs) == 0 {
		return nil
	}
	st, err := os.Stat(s.upperPath(sn.ParentIDs[0]))
	if err != nil {
		return fmt.Errorf("stat parent: %w", err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return os.Lchown(upper, int(sys.Uid), int(sys.Gid))
	}
	return nil
}

// Mounts gives the mounts of a writable or read-only snapshot again.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var sn storage.Snapshot
	if err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		sn, err = storage.GetSnapshot(ctx, key)
		return err
	}); err != nil {
		return nil, fmt.Errorf("mounts of snapshot %s: %w", key, err)
	}
	return s.mounts(sn)
}

func (s *Snapshotter) mounts(sn storage.Snapshot) ([]mount.Mount, error) {
	lower, images, err := s.lowerDirs(sn.ParentIDs)
	if err != nil {
		return nil, err
	}
	active := sn.Kind == snapshots.KindActive
	switch {
	case len(lower) == 0 && active:
		return bind(s.upperPath(sn.ID), "rw"), nil
	case len(lower) == 0:
		return bind(s.upperPath(sn.ID), "ro"), nil
	case len(lower) == 1 && !active:
		return bind(lower[0], "ro"), nil
	}
	var options []string
	if active {
		options = append(options, "workdir="+s.workPath(sn.ID), "upperdir="+s.upperPath(sn.ID))
	}
	options = append(options, "lowerdir="+strings.Join(lower, ":"))
	if images {
		// Each image is a file system of its own, which a container would see in the device numbers of its files, and the inode
		// numbers of two images are alike. An image's are far from using the bits that tell them apart.
		options = append(options, "xino=on")
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, s.options...)}}, nil
}

func bind(source, mode string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: source, Options: []string{mode, "rbind"}}}
}

// lowerDirs are the parents' directories, nearest first. A layer that an image has twice is one tree here, and overlayfs refuses
// a directory that comes twice. The lower one can go: whatever it shows or hides, the upper one does as well. images says that
// some of them are mounted images.
func (s *Snapshotter) lowerDirs(ids []string) (_ []string, images bool, _ error) {
	dirs := make([]string, 0, len(ids))
	seen := make(map[string]bool, len(ids))
	for _, id := range ids {
		dir := s.upperPath(id)
		tree, err := treeOf(dir)
		if err != nil {
			return nil, false, err
		}
		if tree != "" {
			if seen[tree] {
				continue
			}
			image, err := s.trees.ready(tree)
			if err != nil {
				return nil, false, err
			}
			images = images || image
			seen[tree] = true
		}
		dirs = append(dirs, dir)
	}
	return dirs, images, nil
}

// treeOf is the name of the tree that a snapshot's directory points to, or empty if it is a directory of its own.
func treeOf(dir string) (string, error) {
	to, err := os.Readlink(dir)
	if errors.Is(err, syscall.EINVAL) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("snapshot directory: %w", err)
	}
	return filepath.Base(filepath.Dir(to)), nil
}
