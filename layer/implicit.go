package layer

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// AdoptImplicitDirs gives directories of an unpacked layer that had no entry of their own what the same path has in the nearest
// parent layer that holds it: owner, mode, extended attributes (but for trusted.*) and times. A path that no parent has, or that
// is something else there, keeps root, 0755. This is what containerd's applier does when it makes such a directory; it is apart
// from Unpack because a layer can be unpacked before its parents.
//
// dir is the layer's tree, implicit its Result.ImplicitDirs, parents the trees of the layers below, nearest first.
func AdoptImplicitDirs(dir string, implicit, parents []string) error {
	if len(implicit) == 0 || len(parents) == 0 {
		return nil
	}
	root, err := openRoot(dir)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	lower := make([]int, 0, len(parents))
	defer func() {
		for _, fd := range lower {
			_ = unix.Close(fd)
		}
	}()
	for _, p := range parents {
		fd, err := openRoot(p)
		if err != nil {
			return err
		}
		lower = append(lower, fd)
	}
	for _, name := range implicit {
		if err := adoptDir(root, lower, name); err != nil {
			return fmt.Errorf("adopt directory %s of %s: %w", name, dir, err)
		}
	}
	return nil
}

func openRoot(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", dir, err)
	}
	return fd, nil
}

func adoptDir(root int, lower []int, name string) error {
	for _, parent := range lower {
		// Links within a parent lead within that parent, as they would for a process whose root it is.
		from, err := unix.Openat2(parent, name, &unix.OpenHow{
			Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT,
		})
		switch {
		case errors.Is(err, unix.ENOENT):
			continue
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return nil // something else took its place there
		case err != nil:
			return err
		}
		defer unix.Close(from)
		to, err := unix.Openat2(root, name, &unix.OpenHow{
			Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		if err != nil {
			return err
		}
		defer unix.Close(to)
		return copyDir(from, to)
	}
	return nil
}

// copyDir copies owner, mode, extended attributes and times from one directory to another.
func copyDir(from, to int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	return setTimes(to, st.Atim, st.Mtim)
}

func copyXattrs(from, to int) error {
	list, err := readXattr(func(buf []byte) (int, error) { return unix.Flistxattr(from, buf) })
	if err != nil {
		return fmt.Errorf("list extended attributes: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(list), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.") {
			continue
		}
		value, err := readXattr(func(buf []byte) (int, error) { return unix.Fgetxattr(from, name, buf) })
		if errors.Is(err, unix.ENODATA) {
			continue
		} else if err != nil {
			return fmt.Errorf("get extended attribute %q: %w", name, err)
		}
		err = unix.Fsetxattr(to, name, value, unix.XATTR_CREATE)
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("set extended attribute %q: %w", name, err)
		}
	}
	return nil
}

// readXattr calls get with a buffer that is large enough. A file system without attributes has none.
func readXattr(get func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := get(buf)
		switch {
		case err == nil:
			return buf[:n], nil
		case errors.Is(err, unix.ENOTSUP):
			return nil, nil
		case !errors.Is(err, unix.ERANGE) || size > 1<<20:
			return nil, err
		}
	}
}
