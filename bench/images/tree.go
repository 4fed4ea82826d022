package images

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How an OCI layer says that something below it is gone.
const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
)

// writeLayer writes the tree under root, which may be the upper folder of an overlay, as the tar of an OCI layer: sorted,
// owners as numbers, times in whole seconds, extended attributes and hard links kept, overlayfs's whiteouts and opaque
// folders turned into OCI's. What a package manager leaves behind and no image needs is left out.
//
// lower are the trees that the overlay had below: it marks every new folder as opaque, and only where there was something
// to hide does the mark mean anything to others.
func writeLayer(ctx context.Context, w io.Writer, root string, lower []string) error {
	t := &treeWriter{tar: tar.NewWriter(w), root: root, lower: lower, links: map[inode]string{}}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil || name == "." || ephemeral(name) {
			return err
		}
		return t.add(name)
	})
	if err != nil {
		return err
	}
	return t.tar.Close()
}

// ephemeral reports whether a path is a by-product of building. Folders that a running system expects are kept, empty.
func ephemeral(name string) bool {
	for _, dir := range []string{"var/cache/apt", "var/lib/apt/lists", "var/log", "var/tmp", "tmp", "run", "dev", "proc", "sys"} {
		if strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	switch name {
	case "var/cache/ldconfig/aux-cache", "var/cache/debconf/config.dat-old", "var/cache/debconf/templates.dat-old",
		"var/lib/dpkg/status-old", "var/lib/dpkg/diversions-old", "var/lib/dpkg/statoverride-old",
		"var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend", "var/lib/dpkg/triggers/Lock":
		return true
	}
	return false
}

type inode struct{ device, number uint64 }

type treeWriter struct {
	tar   *tar.Writer
	root  string
	lower []string
	links map[inode]string // first name of each file that has several
}

func (t *treeWriter) add(name string) error {
	path := filepath.Join(t.root, name)
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("stat %s: no owner in it", path)
	}
	switch {
	case info.Mode()&fs.ModeSocket != 0:
		return nil // no tar can hold one
	case info.Mode()&fs.ModeCharDevice != 0 && stat.Rdev == 0:
		dir, file := filepath.Split(name)
		return t.marker(dir + whiteoutPrefix + file)
	}
	header, err := t.header(name, path, info, stat)
	if err != nil {
		return err
	}
	if err := t.tar.WriteHeader(header); err != nil {
		return fmt.Errorf("write tar header of %s: %w", name, err)
	}
	if header.Typeflag == tar.TypeReg {
		return t.content(path)
	}
	if header.Typeflag == tar.TypeDir && attribute(path, "trusted.overlay.opaque") == "y" && t.hides(name) {
		return t.marker(filepath.Join(name, opaqueMarker))
	}
	return nil
}

// hides reports whether a path was there before the overlay changed it.
func (t *treeWriter) hides(name string) bool {
	for _, tree := range t.lower {
		if _, err := os.Lstat(filepath.Join(tree, name)); err == nil {
			return true
		}
	}
	return false
}

func (t *treeWriter) header(name, path string, info fs.FileInfo, stat *syscall.Stat_t) (*tar.Header, error) {
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if target, err = os.Readlink(path); err != nil {
			return nil, err
		}
	}
	header, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return nil, err
	}
	header.Name = name
	if info.IsDir() {
		header.Name += "/"
	}
	header.Uname, header.Gname = "", "" // names are the image's matter, and this is another system
	header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}
	header.ModTime = header.ModTime.Truncate(time.Second)
	if info.Mode().IsRegular() && stat.Nlink > 1 {
		id := inode{device: stat.Dev, number: stat.Ino}
		if first, seen := t.links[id]; seen {
			header.Typeflag, header.Linkname, header.Size = tar.TypeLink, first, 0
			return header, nil
		}
		t.links[id] = name
	}
	header.PAXRecords, err = attributes(path)
	return header, err
}

// marker writes an empty file that stands for something else.
func (t *treeWriter) marker(name string) error {
	err := t.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, ModTime: time.Unix(0, 0)})
	if err != nil {
		return fmt.Errorf("write tar header of %s: %w", name, err)
	}
	return nil
}

func (t *treeWriter) content(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := io.Copy(t.tar, file); err != nil {
		return fmt.Errorf("copy %s: %w", path, err)
	}
	return nil
}

// attributes returns a file's extended attributes as records of its tar header, without those of overlayfs itself.
func attributes(path string) (map[string]string, error) {
	buffer := make([]byte, 64<<10) // the kernel's own limit of such a list
	n, err := unix.Llistxattr(path, buffer)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes of %s: %w", path, err)
	}
	records := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimRight(string(buffer[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		records["SCHILY.xattr."+name] = attribute(path, name)
	}
	return records, nil
}

// attribute returns one extended attribute, empty if the file does not have it.
func attribute(path, name string) string {
	buffer := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(path, name, buffer)
	if err != nil {
		return ""
	}
	return string(buffer[:n])
}
