package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
)

// Form is how the trees of new layers are kept. Those that are there stay what they are; both may be below one root.
type Form string

const (
	FormAuto      Form = "auto"      // images if this kernel mounts them from files, directories otherwise
	FormErofs     Form = "erofs"     // one EROFS image a layer, except for layers that cannot be one
	FormDirectory Form = "directory" // a directory a layer
)

// imageName is the image in a tree's directory; a tree that is a directory has none.
const imageName = "layer.erofs"

// imageOf is the image of a tree's directory, if it is kept as one.
func imageOf(dir string) (image string, ok bool) {
	image = filepath.Join(dir, imageName)
	_, err := os.Lstat(image)
	return image, err == nil
}

// chooseForm says what auto is on this machine.
func chooseForm(want Form, root string, log *slog.Logger) (Form, error) {
	if want == FormDirectory {
		return want, nil
	}
	err := probeImages(root)
	switch {
	case err == nil:
		return FormErofs, nil
	case want == FormErofs:
		return want, fmt.Errorf("layers as EROFS images: %w", err)
	}
	log.Info("layers are kept as directories", "reason", err)
	return FormDirectory, nil
}

// probeImages makes an image of an empty layer and mounts it.
func probeImages(root string) (err error) {
	dir, err := os.MkdirTemp(filepath.Join(root, "staging"), "probe-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeTree(dir)) }()
	unpacker, err := layer.New(layer.Config{})
	if err != nil {
		return err
	}
	empty := make([]byte, 1024) // the end of a tar
	spec := layer.Spec{Digest: digest.FromBytes(empty), DiffID: digest.FromBytes(empty)}
	if _, err := unpacker.UnpackImage(context.Background(), bytes.NewReader(empty), spec, filepath.Join(dir, imageName)); err != nil {
		return err
	}
	if err := makeDir(filepath.Join(dir, "fs"), 0o755); err != nil {
		return err
	}
	if _, err := mountTree(dir); err != nil {
		return fmt.Errorf("this kernel does not mount EROFS from a file on this file system (Linux 6.12 does, with CONFIG_EROFS_FS_BACKED_BY_FILE): %w", err)
	}
	return nil
}

// mountTree mounts the image of a tree's directory, if it has one, on its fs. Containers reach it through overlays of their own,
// which say what a device or a set-user-id bit is worth.
func mountTree(dir string) (isImage bool, err error) {
	image, ok := imageOf(dir)
	if !ok {
		return false, nil
	}
	at := filepath.Join(dir, "fs")
	if mounted, err := isMounted(at); err != nil || mounted {
		return true, err
	}
	if err := unix.Mount(image, at, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return true, fmt.Errorf("mount image %s: %w", image, err)
	}
	return true, nil
}

// isMounted says whether something is mounted on a directory.
func isMounted(dir string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		return false, fmt.Errorf("look for a mount on %s: %w", dir, err)
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// removeTree removes a directory that a tree's image may be mounted in. Containers that still use the image keep it, unseen.
func removeTree(dir string) error {
	for at := filepath.Join(dir, "fs"); ; {
		mounted, err := isMounted(at)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return err
		}
		if !mounted {
			return os.RemoveAll(dir)
		}
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", at, err)
		}
	}
}
