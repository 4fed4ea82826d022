package layer

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer/erofs"
)

// AdoptImplicitDirs gives directories of an unpacked layer that had no entry of their own what the same path has in the nearest
// parent layer that holds it: owner, mode, extended attributes (but for trusted.*) and times. A path that no parent has, or that
// is something else there, keeps root, 0755. This is what containerd's applier does when it makes such a directory; it is apart
// from Unpack because a layer can be unpacked before its parents.
//
// tree is the layer's directory or image, which is not mounted, parents the trees of the layers below, nearest first. It is an
// ErrNoImage if a parent's attributes do not fit into the image.
func (r *Result) AdoptImplicitDirs(tree string, parents []string) (err error) {
	if len(r.ImplicitDirs) == 0 || len(parents) == 0 {
		return nil
	}
	to, err := r.adopter(tree)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.close()) }()
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
	for _, name := range r.ImplicitDirs {
		if err := adoptDir(to, lower, name); err != nil {
			return fmt.Errorf("adopt directory %s of %s: %w", name, tree, err)
		}
	}
	return nil
}

// adopter sets what a directory of a tree adopts.
type adopter interface {
	adopt(name string, m meta) error
	close() error
}

func (r *Result) adopter(tree string) (adopter, error) {
	if r.slots == nil {
		fd, err := openRoot(tree)
		return dirAdopter(fd), err
	}
	file, err := os.OpenFile(tree, os.O_RDWR, 0)
	return &imageAdopter{file, r.slots}, err
}

func openRoot(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", dir, err)
	}
	return fd, nil
}

// adoptDir finds the directory that one of the tree takes after.
func adoptDir(to adopter, lower []int, name string) error {
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
		m, err := readMeta(from)
		_ = unix.Close(from)
		if err != nil {
			return err
		}
		return to.adopt(name, m)
	}
	return nil
}

// readMeta reads what a directory can give.
func readMeta(fd int) (meta, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return meta{}, err
	}
	m := meta{mode: st.Mode & 0o7777, uid: int(st.Uid), gid: int(st.Gid), atime: st.Atim, mtime: st.Mtim}
	list, err := readXattr(func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) })
	if err != nil {
		return meta{}, fmt.Errorf("list extended attributes: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(list), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.") {
			continue
		}
		value, err := readXattr(func(buf []byte) (int, error) { return unix.Fgetxattr(fd, name, buf) })
		if errors.Is(err, unix.ENODATA) {
			continue
		} else if err != nil {
			return meta{}, fmt.Errorf("get extended attribute %q: %w", name, err)
		}
		m.xattrs = append(m.xattrs, xattr{name, string(value)})
	}
	return m, nil
}

// dirAdopter is a tree that is a directory: the descriptor of its root.
type dirAdopter int

func (root dirAdopter) close() error { return unix.Close(int(root)) }

func (root dirAdopter) adopt(name string, m meta) error {
	to, err := unix.Openat2(int(root), name, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return err
	}
	defer unix.Close(to)
	if _, err := m.applyTo(to); err != nil {
		return err
	}
	return setTimes(to, m.atime, m.mtime)
}

// imageAdopter is a tree that is an image, with the slots of its implicit directories.
type imageAdopter struct {
	file  *os.File
	slots map[string]uint64
}

func (i *imageAdopter) close() error { return i.file.Close() }

// adopt writes a directory's inode again. Room for attributes was kept behind it.
func (i *imageAdopter) adopt(name string, m meta) error {
	at := int64(i.slots[name]) * erofs.SlotSize
	old, body, _, err := readInode(i.file, at)
	if err != nil {
		return err
	}
	had, err := erofs.GetXattrs(body)
	if err != nil {
		return fmt.Errorf("read the image: %w", err)
	}
	list, err := storable(m.xattrs, unix.S_IFDIR)
	if err != nil {
		return err
	}
	for _, a := range had {
		list = append(list, xattr{a.Name, a.Value}) // that it is opaque, which no parent gives
	}
	xattrs, err := encodeXattrs(list, m.mode)
	if err != nil {
		return err
	}
	ino := inodeOf(unix.S_IFDIR, m)
	ino.Layout, ino.Size, ino.Start, ino.Links, ino.XattrUnits = old.Layout, old.Size, old.Start, old.Links, erofs.XattrUnits(xattrs)
	out := slices.Concat(make([]byte, erofs.InodeSize), xattrs)
	if len(out) > implicitRoom {
		return fmt.Errorf("%w: its directory would adopt %d bytes of extended attributes", ErrNoImage, len(xattrs))
	}
	ino.Put(out)
	return pwriteAll(int(i.file.Fd()), out, at)
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
