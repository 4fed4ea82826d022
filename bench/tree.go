package bench

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Tree describes every file under root, a line each: path, mode, owner, link count and group of hard links, size, times,
// device numbers, xattrs and content. Two systems that unpacked one image the same way give the same lines. Directories have
// no size and no link count here, since these are the file system's own; nor has the root a time: no layer says it.
func Tree(root string) (map[string]string, error) {
	tree := map[string]string{}
	linkGroups := map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		tree[rel], err = describe(path, rel, linkGroups)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read tree %s: %w", root, err)
	}
	return tree, nil
}

func describe(path, rel string, linkGroups map[uint64]string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", fmt.Errorf("lstat %s: %w", path, err)
	}
	line := fmt.Sprintf("mode=%o owner=%d:%d rdev=%d", st.Mode, st.Uid, st.Gid, st.Rdev)
	if rel != "." {
		line += fmt.Sprintf(" mtime=%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
	}
	content, err := contentOf(path, st.Mode)
	if err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		first, ok := linkGroups[st.Ino]
		if !ok {
			first, linkGroups[st.Ino] = rel, rel
		}
		line += fmt.Sprintf(" size=%d links=%d of=%s", st.Size, st.Nlink, first)
	}
	attrs, err := xattrs(path)
	return line + content + attrs, err
}

// contentOf is a file's digest or a symbolic link's target.
func contentOf(path string, mode uint32) (string, error) {
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		return " target=" + target, err
	case unix.S_IFREG:
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return "", err
		}
		return " sha256=" + hex.EncodeToString(h.Sum(nil)), nil
	}
	return "", nil
}

// xattrs of a file itself, sorted by name.
func xattrs(path string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil || n == 0 {
		return "", err
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	var line strings.Builder
	for _, name := range names {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", fmt.Errorf("xattr %s of %s: %w", name, path, err)
		}
		fmt.Fprintf(&line, " %s=%x", name, value[:n])
	}
	return line.String(), nil
}

// Differences between two trees, at most limit of them, sorted by path.
func Differences(a, b map[string]string, limit int) []string {
	var out []string
	for path, line := range a {
		if other, ok := b[path]; !ok {
			out = append(out, fmt.Sprintf("%s: only in the first", path))
		} else if other != line {
			out = append(out, fmt.Sprintf("%s:\n\t%s\n\t%s", path, line, other))
		}
	}
	for path := range b {
		if _, ok := a[path]; !ok {
			out = append(out, fmt.Sprintf("%s: only in the second", path))
		}
	}
	slices.Sort(out)
	return out[:min(len(out), limit)]
}
