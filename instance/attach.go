package instance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/prefetch"
)

// Where a Function finds what is its own; see docs/RUNTIMES.md.
const (
	codePath    = "/workspace"
	secretsPath = "/run/secrets"
)

// viewAttributes restrict the mount of a code package.
const viewAttributes = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV

// Bounds of a code package that has to be copied, because the container's memory may be what holds it.
const (
	maxCopyBytes = 512 << 20
	maxCopyFiles = 100_000
)

// attachment is a tree that is to be seen in a container, read-only, at a path.
type attachment struct {
	Path string
	Tree *os.File // a mount that nobody sees; its place in the container is its only one
}

// attach shows trees to every process of a container whose mount namespace that is. It is some 30 µs a tree: see open_tree(2).
func attach(namespace *os.File, list []attachment) error {
	return inMountsOf(namespace, func() error {
		for _, a := range list {
			if err := attachOne(a); err != nil {
				return fmt.Errorf("mount %s: %w", a.Path, err)
			}
		}
		return nil
	})
}

// attachOne runs in the container's namespace. No link of the container's is followed.
func attachOne(a attachment) error {
	dir, err := openPlace(unix.AT_FDCWD, a.Path)
	if err != nil {
		return err
	}
	defer dir.Close()
	err = unix.MoveMount(int(a.Tree.Fd()), "", int(dir.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return &os.SyscallError{Syscall: "move_mount", Err: err}
	}
	return nil
}

// openPlace opens a directory of a container by an absolute path, from the root that at is or from the thread's own, and makes it
// if it is not there.
func openPlace(at int, path string) (*os.File, error) {
	if at == unix.AT_FDCWD {
		root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		defer unix.Close(root)
		at = root
	}
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
	parent, err := unix.Openat2(at, filepath.Dir(path), how)
	if err != nil {
		return nil, err
	}
	defer unix.Close(parent)
	if err := unix.Mkdirat(parent, filepath.Base(path), 0o755); err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EROFS) {
		return nil, err
	}
	fd, err := unix.Openat2(parent, filepath.Base(path), how)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Mount implements launcher. Where the kernel does not move mounts into the container the trees are copied there, which takes as
// long as it takes; the root is writable meanwhile, when no Function is in the container yet.
func (l *taskLauncher) Mount(ctx context.Context, list ...attachment) error {
	err := attach(l.namespace, list)
	refused := (*os.SyscallError)(nil)
	if err == nil || !errors.As(err, &refused) {
		return err
	}
	root, openErr := os.Open("/proc/" + strconv.FormatUint(uint64(l.pid), 10) + "/root")
	if openErr != nil {
		return errors.Join(err, openErr)
	}
	defer root.Close()
	if openErr := setRoot(l.namespace, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); openErr != nil {
		return errors.Join(err, openErr)
	}
	for _, a := range list {
		if copyErr := copyTree(ctx, root, a); copyErr != nil {
			return errors.Join(err, fmt.Errorf("copy to %s instead: %w", a.Path, copyErr))
		}
	}
	return setRoot(l.namespace, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

// setRoot changes the attributes of a container's root file system.
func setRoot(namespace *os.File, change *unix.MountAttr) error {
	return inMountsOf(namespace, func() error {
		if err := unix.MountSetattr(unix.AT_FDCWD, "/", 0, change); err != nil {
			return fmt.Errorf("change the container's root: %w", err)
		}
		return nil
	})
}

// copyTree copies a tree into an empty place below root. The source stays as it is; nothing outside the place is written to.
func copyTree(ctx context.Context, root *os.File, a attachment) error {
	dir, err := openPlace(int(root.Fd()), a.Path)
	if err != nil {
		return err
	}
	defer dir.Close()
	to, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return err
	}
	defer to.Close()
	from, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", a.Tree.Fd()))
	if err != nil {
		return err
	}
	defer from.Close()
	c := copier{from: from, to: to, bytes: maxCopyBytes, files: maxCopyFiles}
	return fs.WalkDir(from.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil || path == "." {
			return err
		}
		return c.copy(path, d)
	})
}

// copier copies within bounds.
type copier struct {
	from, to *os.Root
	bytes    int64
	files    int
}

func (c *copier) copy(path string, d fs.DirEntry) error {
	if c.files--; c.files < 0 {
		return fmt.Errorf("more than %d files", maxCopyFiles)
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	switch {
	case d.IsDir():
		return c.to.Mkdir(path, info.Mode().Perm())
	case d.Type() == fs.ModeSymlink:
		target, err := c.from.Readlink(path)
		if err != nil {
			return err
		}
		return c.to.Symlink(target, path)
	case d.Type().IsRegular():
		return c.file(path, info)
	}
	return nil // devices and sockets are no code, and the mount would not let them be used either
}

func (c *copier) file(path string, info fs.FileInfo) error {
	if c.bytes -= info.Size(); c.bytes < 0 {
		return fmt.Errorf("more than %d bytes", maxCopyBytes)
	}
	from, err := c.from.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := c.to.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(to, io.LimitReader(from, info.Size()))
	return errors.Join(err, to.Close())
}

// view is the mounted tree of a code package, which nobody sees. It implements codeTree.
type view struct {
	tree    *os.File
	mounts  []mount.Mount
	scratch string
	layers  []prefetch.Layer
}

func newView(mounts []mount.Mount, scratch string, layers []prefetch.Layer) (*view, error) {
	tree, err := mountDetached(mounts, scratch, viewAttributes)
	if err != nil {
		return nil, err
	}
	return &view{tree, mounts, scratch, layers}, nil
}

// Clone implements codeTree.
func (v *view) Clone() (*os.File, error) {
	fd, err := unix.OpenTree(int(v.tree.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.15 a mount of no namespace is not cloned, nor later one of several layers
		return mountDetached(v.mounts, v.scratch, viewAttributes)
	}
	if err != nil {
		return nil, fmt.Errorf("clone mount: %w", err)
	}
	return os.NewFile(uintptr(fd), codePath), nil
}

// Layers implements codeTree.
func (v *view) Layers() []prefetch.Layer { return v.layers }

// Close implements codeTree. Clones stay.
func (v *view) Close() error { return v.tree.Close() }

// secretsTree makes a file system in memory with the secrets as files, which nobody sees before it is attached and which goes with
// the container.
func secretsTree(secrets map[string][]byte) (*os.File, error) {
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("secrets: open tmpfs: %w", err)
	}
	defer unix.Close(fsfd)
	_ = unix.FsconfigSetFlag(fsfd, "noswap") // before Linux 6.4 there is no such word
	for key, value := range map[string]string{"mode": "0755", "size": strconv.Itoa(2*maxSecretsBytes + 4096*maxSecrets), "nr_inodes": strconv.Itoa(maxSecrets + 16)} {
		if err := unix.FsconfigSetString(fsfd, key, value); err != nil {
			return nil, fmt.Errorf("secrets: tmpfs's %s: %w", key, err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, fmt.Errorf("secrets: create tmpfs: %w", err)
	}
	const attributes = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return nil, fmt.Errorf("secrets: mount tmpfs: %w", err)
	}
	tree := os.NewFile(uintptr(fd), secretsPath)
	if err := fillSecrets(tree, secrets); err != nil {
		return nil, errors.Join(fmt.Errorf("secrets: %w", err), tree.Close())
	}
	return tree, nil
}

// fillSecrets writes the files and then forbids to write. Everyone in the container may read: all of it is the Function's.
func fillSecrets(tree *os.File, secrets map[string][]byte) error {
	for name, value := range secrets {
		fd, err := unix.Openat(int(tree.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o444)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), name)
		_, err = f.Write(value)
		if err := errors.Join(err, f.Chmod(0o444), f.Close()); err != nil {
			return err
		}
	}
	return unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}
