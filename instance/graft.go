package instance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// carried are the mounts of a launcher's container that go with it into the Function's root file system.
var carried = []struct {
	path string
	file bool
}{
	{path: "proc"},
	{path: "dev"},
	{path: "sys"},
	{path: "run"},
	{path: "etc/" + fileHosts, file: true},
	{path: "etc/" + fileHostname, file: true},
	{path: "etc/" + fileResolvConf, file: true},
}

// detach mounts a writable snapshot where nobody sees it, with a place for each of the carried mounts.
func detach(mounts []mount.Mount, scratch string) (*os.File, error) {
	tree, err := mountDetached(mounts, scratch, 0)
	if err != nil {
		return nil, err
	}
	for _, m := range carried {
		if err := makeMountPoint(tree, m.path, m.file); err != nil {
			return nil, errors.Join(fmt.Errorf("place for /%s: %w", m.path, err), tree.Close())
		}
	}
	return tree, nil
}

// mountDetached mounts a snapshot in no namespace: the mount goes with the last file that refers to it, so that whoever is killed
// leaves none behind. flags restrict it, as in MS_RDONLY. scratch is an empty directory.
func mountDetached(mounts []mount.Mount, scratch string, flags uintptr) (*os.File, error) {
	if len(mounts) != 1 || mounts[0].Type != "overlay" && mounts[0].Type != "bind" {
		return nil, fmt.Errorf("a root file system of other than one overlay or directory: %v", mounts)
	}
	var tree *os.File
	err := onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("make a mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("keep mounts private: %w", err)
		}
		if err := mountOne(mounts[0], scratch); err != nil {
			return err
		}
		if flags != 0 {
			if err := unix.Mount("", scratch, "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
				return fmt.Errorf("restrict mount: %w", err)
			}
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, scratch, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("detach mount: %w", err)
		}
		tree = os.NewFile(uintptr(fd), scratch)
		return nil
	})
	return tree, err
}

// mountOne mounts an overlay or a directory; the thread's working directory is lost.
func mountOne(m mount.Mount, target string) error {
	if m.Type == "bind" {
		if err := unix.Mount(m.Source, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.Source, err)
		}
		return nil
	}
	base, options := relativeLowers(m.Options)
	if err := unix.Chdir(base); err != nil {
		return fmt.Errorf("enter %s: %w", base, err)
	}
	if err := unix.Mount("overlay", target, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	return nil
}

// relativeLowers shortens an overlay's options, of which the kernel takes a page: the directories of an image of many layers are
// named from the one that they have in common.
func relativeLowers(options []string) (base, joined string) {
	base = "/"
	short := make([]string, len(options))
	for i, option := range options {
		short[i] = option
		list, ok := strings.CutPrefix(option, "lowerdir=")
		if !ok {
			continue
		}
		lowers := strings.Split(list, ":")
		base = commonDir(lowers)
		for j, dir := range lowers {
			if rel, err := filepath.Rel(base, dir); err == nil {
				lowers[j] = rel
			}
		}
		short[i] = "lowerdir=" + strings.Join(lowers, ":")
	}
	return base, strings.Join(short, ",")
}

// commonDir is the deepest directory that holds all of the paths.
func commonDir(paths []string) string {
	common := filepath.Dir(paths[0])
	for _, path := range paths {
		for common != "/" && !strings.HasPrefix(path, common+"/") {
			common = filepath.Dir(common)
		}
	}
	return common
}

// makeMountPoint makes an empty directory or file unless there is one. The image may have put anything there: links are followed
// inside its tree only, and one in the last place is replaced.
func makeMountPoint(tree *os.File, path string, file bool) error {
	dir, err := makeDirs(tree, filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	at, name := int(dir.Fd()), filepath.Base(path)
	var st unix.Stat_t
	err = unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if err := unix.Unlinkat(at, name, 0); err != nil {
			return fmt.Errorf("replace link: %w", err)
		}
		err = unix.ENOENT
	}
	switch {
	case errors.Is(err, unix.ENOENT) && file:
		fd, err := unix.Openat(at, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	case errors.Is(err, unix.ENOENT):
		return unix.Mkdirat(at, name, 0o755)
	case err != nil:
		return err
	case (st.Mode&unix.S_IFMT == unix.S_IFDIR) == file:
		return errors.New("the image has something else there")
	}
	return nil
}

// makeDirs opens a directory of a tree, having made what is missing of it: not more than one level, for what is carried.
func makeDirs(tree *os.File, path string) (*os.File, error) {
	dir, err := openIn(tree, path, unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		if err := unix.Mkdirat(int(tree.Fd()), path, 0o755); err != nil {
			return nil, err
		}
		dir, err = openIn(tree, path, unix.O_DIRECTORY)
	}
	return dir, err
}

// openIn opens a path of a tree, which is the root for all links in it.
func openIn(tree *os.File, path string, flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(int(tree.Fd()), path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC | flags, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// graft exchanges the root file system of a container that runs the launcher: tree, which detach made, takes its place, for all
// its processes, and keeps what is carried. namespace is the container's mount namespace. After an error the container is good
// for nothing. See pivot_root(2), move_mount(2).
func graft(namespace, tree *os.File) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil { // a thread that shares its root with others cannot leave
			return fmt.Errorf("unshare root: %w", err)
		}
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter the container's mounts: %w", err)
		}
		err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, launcherGraft, unix.MOVE_MOUNT_F_EMPTY_PATH)
		if err != nil {
			return fmt.Errorf("mount root: %w", err)
		}
		for _, m := range carried {
			if err := carry(tree, m.path); err != nil {
				return fmt.Errorf("carry /%s: %w", m.path, err)
			}
		}
		if err := unix.Fchdir(int(tree.Fd())); err != nil {
			return fmt.Errorf("enter root: %w", err)
		}
		if err := unix.PivotRoot(".", "."); err != nil {
			return fmt.Errorf("change root: %w", err)
		}
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil { // the old one, which lies over the new
			return fmt.Errorf("unmount the launcher's root: %w", err)
		}
		return nil
	})
}

// carry moves a mount to the same path in tree.
func carry(tree *os.File, path string) error {
	dir, err := openIn(tree, filepath.Dir(path), unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	to, err := unix.Openat(int(dir.Fd()), filepath.Base(path), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	return unix.MoveMount(unix.AT_FDCWD, "/"+path, to, "", unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// onOwnThread runs f on a thread that ends with it, for what a thread cannot be brought back from. It is never the process's
// first thread, which cannot end and through which others see the process.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			done <- f() // without UnlockOSThread: the thread ends with the goroutine
			return
		}
		err := onOwnThread(f)
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}
