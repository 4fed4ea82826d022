package instance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
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
	{path: "tmp"},
	{path: "var/tmp"},
	{path: "etc/" + fileHosts, file: true},
	{path: "etc/" + fileHostname, file: true},
	{path: "etc/" + fileResolvConf, file: true},
}

// upperBytes bounds what is written to a root file system before it is a Function's: places for mounts.
const upperBytes = 1 << 20

// detach mounts a snapshot where nobody sees it, with a place for each of the carried mounts. What is written to tree is in a file
// system in memory, upper, which has next to no room until resize gives it some: so nothing that a Function writes is ever on the
// disk, and all of it counts as memory of whoever wrote it.
func detach(mounts []mount.Mount, scratch string) (tree, upper *os.File, err error) {
	if err := checkMounts(mounts); err != nil {
		return nil, nil, err
	}
	err = inOwnMounts(func() (err error) {
		tree, upper, err = mountOver(mounts[0], scratch)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	for _, m := range carried {
		if err := makeMountPoint(tree, m.path, m.file); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("place for /%s: %w", m.path, err), tree.Close(), upper.Close())
		}
	}
	return tree, upper, nil
}

// mountOver mounts a snapshot with a tmpfs as its uppermost directory, and detaches both.
func mountOver(m mount.Mount, scratch string) (tree, upper *os.File, err error) {
	lower := mount.Mount{Type: "overlay", Options: []string{"lowerdir=" + m.Source}}
	own := m.Source // the directory that has the root's mode and owner
	if m.Type == "overlay" {
		lower.Options = nil
		for _, option := range m.Options {
			key, value, _ := strings.Cut(option, "=")
			switch key {
			case "upperdir":
				own = value
			case "workdir":
			default:
				lower.Options = append(lower.Options, option)
			}
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(own, &st); err != nil {
		return nil, nil, fmt.Errorf("look at %s: %w", own, err)
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", 0, "mode=0700,size="+strconv.Itoa(upperBytes)); err != nil {
		return nil, nil, fmt.Errorf("mount memory for what is written: %w", err)
	}
	root, top, work := scratch+"/root", scratch+"/upper", scratch+"/work"
	for _, dir := range []string{root, top, work} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, nil, err
		}
	}
	if err := errors.Join(unix.Chmod(top, st.Mode&0o7777), unix.Chown(top, int(st.Uid), int(st.Gid))); err != nil {
		return nil, nil, fmt.Errorf("owner and mode of the root: %w", err)
	}
	lower.Options = append(lower.Options, "upperdir="+top, "workdir="+work)
	if err := mountOne(lower, root); err != nil {
		return nil, nil, err
	}
	if tree, err = detached(root); err != nil {
		return nil, nil, err
	}
	if upper, err = detached(scratch); err != nil {
		return nil, nil, errors.Join(err, tree.Close())
	}
	return tree, upper, nil
}

// detached is a mount's clone that is in no namespace: it goes with the last file that refers to it.
func detached(path string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("detach mount: %w", err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// resize sets how much a tmpfs takes. One that has more already is left as it is.
func resize(at int, path string, bytes int64) error {
	fs, err := unix.Fspick(at, path, unix.FSPICK_CLOEXEC|unix.FSPICK_EMPTY_PATH)
	if err != nil {
		return &os.SyscallError{Syscall: "fspick", Err: err}
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "size", strconv.FormatInt(bytes, 10)); err != nil {
		return &os.SyscallError{Syscall: "fsconfig", Err: err}
	}
	if err := unix.FsconfigReconfigure(fs); err != nil && !errors.Is(err, unix.EINVAL) {
		return &os.SyscallError{Syscall: "fsconfig", Err: err}
	}
	return nil
}

func checkMounts(mounts []mount.Mount) error {
	if len(mounts) != 1 || mounts[0].Type != "overlay" && mounts[0].Type != "bind" {
		return fmt.Errorf("a root file system of other than one overlay or directory: %v", mounts)
	}
	return nil
}

// mountDetached mounts a snapshot in no namespace: the mount goes with the last file that refers to it, so that whoever is killed
// leaves none behind. It has these attributes, and is nobody's peer. scratch is an empty directory.
//
// A directory is cloned from our own namespace: a namespace of its own would be a copy of all of the node's mounts, some
// milliseconds where there are many Instances, and the kernel clones no detached mount that was made in another one.
func mountDetached(mounts []mount.Mount, scratch string, attributes uint64) (tree *os.File, err error) {
	if err := checkMounts(mounts); err != nil {
		return nil, err
	}
	if m := mounts[0]; m.Type == "bind" {
		tree, err = detached(m.Source)
	} else {
		err = inOwnMounts(func() (err error) {
			if err := mountOne(m, scratch); err != nil {
				return err
			}
			tree, err = detached(scratch)
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	restricted := &unix.MountAttr{Attr_set: attributes, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, restricted); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict mount: %w", err), tree.Close())
	}
	return tree, nil
}

// inOwnMounts runs f on a thread of its own whose mounts nobody else sees, and which end with it.
func inOwnMounts(f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("make a mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("keep mounts private: %w", err)
		}
		return f()
	})
}

// inMountsOf runs f on a thread of its own in a container's mount namespace.
func inMountsOf(namespace *os.File, f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil { // a thread that shares its root with others cannot leave
			return fmt.Errorf("unshare root: %w", err)
		}
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter the container's mounts: %w", err)
		}
		return f()
	})
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

// makeDirs opens a directory of a tree, having made what is missing of it.
func makeDirs(tree *os.File, path string) (*os.File, error) {
	dir, err := openIn(tree, path, unix.O_DIRECTORY)
	if !errors.Is(err, unix.ENOENT) || path == "." {
		return dir, err
	}
	parent, err := makeDirs(tree, filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if err := unix.Mkdirat(int(parent.Fd()), filepath.Base(path), 0o755); err != nil {
		return nil, err
	}
	return openIn(tree, path, unix.O_DIRECTORY)
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
// its processes, with these attributes, and keeps what is carried. namespace is the container's mount namespace. After an error the
// container is good for nothing. See pivot_root(2), move_mount(2), mount_setattr(2).
func graft(namespace, tree *os.File, attributes uint64) error {
	return inMountsOf(namespace, func() error {
		err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, launcherGraft, unix.MOVE_MOUNT_F_EMPTY_PATH)
		if err != nil {
			return fmt.Errorf("mount root: %w", err)
		}
		for _, m := range carried {
			if err := carry(tree, m.path); err != nil {
				return fmt.Errorf("carry /%s: %w", m.path, err)
			}
		}
		if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: attributes}); err != nil {
			return fmt.Errorf("restrict root: %w", err)
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
