package instance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// ofHolder are the mounts that a process of the holder's needs in its root, whatever else is there: of its own processes, and its own
// devices.
var ofHolder = []string{"proc", "sys", "dev"}

// shownAttributes are those of all that is shown of a Function: nobody but itself changes anything of it.
const shownAttributes = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV

// errShown says that something is shown already.
var errShown = errors.New("something is shown in it already")

// show has whoever enters a pod's holder (kubectl exec) see the Function's files: its root, and what is mounted there, its code and
// secrets among them.
func (e *Engine) show(i *instance) {
	i.mu.Lock()
	pid, in := i.pid, i.sandbox.Holder
	i.mu.Unlock()
	if in.Pid == 0 || pid == 0 || i.worker() { // of workers that share a pod the first is shown
		return
	}
	begun := e.spawn(func(context.Context) {
		err := e.showFunction(i.place(), pid, in)
		if err != nil && !errors.Is(err, errShown) && !errors.Is(err, fs.ErrNotExist) { // the latter when one of them has ended
			e.log.Warn("function's files not shown in its pod", "instance", i.id, "error", err)
		}
	})
	_ = begun // the next engine does it
}

func (e *Engine) showFunction(m member, pid uint32, in holder) error {
	function, err := os.Open(namespacePath(pid, "mnt"))
	if err != nil {
		return err
	}
	defer function.Close()
	inside, err := processesIn(e.cgroups.file(m, "memory", "", ""))
	if err != nil {
		return err
	}
	if !slices.Contains(inside, int(pid)) {
		return fmt.Errorf("process %d is not the function's any more: %w", pid, fs.ErrNotExist)
	}
	pod, root, err := in.open()
	if err != nil {
		return err
	}
	defer pod.Close()
	defer root.Close()
	return showTree(function, pod, root)
}

// open opens a holder's mount namespace and its process's root.
func (h holder) open() (namespace, root *os.File, err error) {
	if namespace, err = os.Open(namespacePath(h.Pid, "mnt")); err != nil {
		return nil, nil, err
	}
	proc := "/proc/" + strconv.FormatUint(uint64(h.Pid), 10)
	if root, err = os.OpenFile(proc+"/root", unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		return nil, nil, errors.Join(err, namespace.Close())
	}
	var st unix.Stat_t
	if err = unix.Stat(proc+"/fd/1", &st); err == nil && h.Pipe != 0 && st.Ino != h.Pipe {
		err = fmt.Errorf("process %d is not the pod's any more: %w", h.Pid, fs.ErrNotExist)
	}
	if err != nil {
		return nil, nil, errors.Join(err, namespace.Close(), root.Close())
	}
	return namespace, root, nil
}

// showTree covers the root of a pod's mount namespace with a copy of the mounts of a function's. The holder's process itself stays
// where it is, in root; who enters the namespace from now on comes to what lies on top. See setns(2), open_tree(2).
func showTree(function, pod, root *os.File) error {
	var tree *os.File
	err := inMountsOf(function, func() (err error) {
		tree, err = cloneAll("/")
		return err
	})
	if err != nil {
		return err
	}
	defer tree.Close()
	restricted := &unix.MountAttr{Attr_set: shownAttributes, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, restricted); err != nil {
		return fmt.Errorf("restrict what is shown: %w", err)
	}
	return inMountsOf(pod, func() error {
		if shown, err := covered(root); shown || err != nil {
			return errors.Join(err, errShown)
		}
		var own []*os.File
		defer func() {
			for _, f := range own {
				_ = f.Close() // it was never written to
			}
		}()
		for _, path := range ofHolder {
			f, err := cloneAll("/" + path)
			if err != nil {
				return err
			}
			own = append(own, f)
		}
		if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("show the function's root: %w", err)
		}
		for n, path := range ofHolder {
			if err := lay(own[n], tree, path); err != nil {
				return errors.Join(fmt.Errorf("the pod's /%s: %w", path, err), uncover(tree))
			}
		}
		return nil
	})
}

// cloneAll is a copy of a mount and of those below it that is in no namespace.
func cloneAll(path string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, fmt.Errorf("copy the mounts of %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// lay mounts over a directory of a tree, which is the root for all links in it.
func lay(mounts, tree *os.File, path string) error {
	to, err := openIn(tree, path, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer to.Close()
	return unix.MoveMount(int(mounts.Fd()), "", int(to.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// covered tells whether something lies over a root in the thread's mount namespace, which it has just entered.
func covered(root *os.File) (bool, error) {
	var was, is unix.Statx_t
	if err := unix.Statx(int(root.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &was); err != nil {
		return false, err
	}
	if err := unix.Statx(unix.AT_FDCWD, "/", 0, unix.STATX_MNT_ID, &is); err != nil {
		return false, err
	}
	return was.Mnt_id != is.Mnt_id, nil
}

// uncover takes away what lies over a root, with all that is mounted in it.
func uncover(top *os.File) error {
	if err := unix.Fchdir(int(top.Fd())); err != nil {
		return err
	}
	return unix.Unmount(".", unix.MNT_DETACH)
}

// hide ends what show has shown: it would keep the Function's files and secrets for as long as the kubelet keeps the pod. One that
// has ended shows nothing.
func (i *instance) hide() error {
	i.mu.Lock()
	in := i.sandbox.Holder
	i.mu.Unlock()
	if in.Pid == 0 || i.worker() {
		return nil
	}
	pod, root, err := in.open()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pod.Close()
	defer root.Close()
	return inMountsOf(pod, func() error {
		shown, err := covered(root)
		if err != nil || !shown {
			return err
		}
		top, err := os.Open("/")
		if err != nil {
			return err
		}
		defer top.Close()
		return uncover(top)
	})
}
