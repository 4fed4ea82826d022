package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// entry is what a test compares of a tar header.
type entry struct {
	Type       string
	Name, Link string
	Mode       int64
	UID, GID   int
	Records    map[string]string
	Content    string
}

func gunzip(t *testing.T, packed io.Reader) io.Reader {
	t.Helper()
	plain, err := gzip.NewReader(packed)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

func read(t *testing.T, packed io.Reader) []entry {
	t.Helper()
	var found []entry
	entries := tar.NewReader(packed)
	for {
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.ModTime.Nanosecond() != 0 || h.Uname != "" {
			t.Errorf("%s: time %v, user name %q", h.Name, h.ModTime, h.Uname)
		}
		text, err := io.ReadAll(entries)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, entry{
			Type: string(h.Typeflag), Name: h.Name, Link: h.Linkname, Mode: h.Mode, UID: h.Uid, GID: h.Gid,
			Records: h.PAXRecords, Content: string(text),
		})
	}
}

// TestWriteLayer packs what the upper folder of an overlay may hold. Whiteouts and trusted attributes need root, as do
// the images whose layers are made this way.
func TestWriteLayer(t *testing.T) {
	root, lower := t.TempDir(), t.TempDir()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(root, name) }
	for _, dir := range []string{"app", "new", "opaque", "var/log", "var/cache/apt/archives", "tmp"} {
		do(os.MkdirAll(at(dir), 0o755))
	}
	do(os.Mkdir(filepath.Join(lower, "opaque"), 0o755))
	do(os.Chmod(at("tmp"), 0o777|os.ModeSticky))
	for name, text := range map[string]string{
		"app/first": "shared", "app/tool": "#!", "opaque/new": "n", "var/log/dpkg.log": "l", "var/cache/apt/pkgcache.bin": "c", "tmp/x": "x",
	} {
		do(os.WriteFile(at(name), []byte(text), 0o644))
	}
	do(os.Link(at("app/first"), at("app/second")))
	do(os.Symlink("../app", at("app/self")))
	do(os.Chown(at("app/tool"), 1000, 1001))
	do(os.Chmod(at("app/tool"), 0o755|os.ModeSetuid))
	do(unix.Setxattr(at("app/tool"), "user.kind", []byte("a\x00b"), 0))
	do(unix.Mknod(at("app/gone"), unix.S_IFCHR, 0))
	do(unix.Mknod(at("var/log/gone"), unix.S_IFCHR, 0))
	do(unix.Mknod(at("app/socket"), unix.S_IFSOCK|0o644, 0))
	do(unix.Setxattr(at("new"), "trusted.overlay.opaque", []byte("y"), 0))
	do(unix.Setxattr(at("opaque"), "trusted.overlay.opaque", []byte("y"), 0))
	do(unix.Setxattr(at("app"), "trusted.overlay.origin", []byte("z"), 0))

	var packed bytes.Buffer
	do(writeLayer(t.Context(), &packed, root, []string{lower}))
	want := []entry{
		{Type: "5", Name: "app/", Mode: 0o755},
		{Type: "0", Name: "app/first", Mode: 0o644, Content: "shared"},
		{Type: "0", Name: "app/.wh.gone", Mode: 0o600},
		{Type: "1", Name: "app/second", Link: "app/first", Mode: 0o644},
		{Type: "2", Name: "app/self", Link: "../app", Mode: 0o777},
		{Type: "0", Name: "app/tool", Mode: 0o4755, UID: 1000, GID: 1001, Content: "#!", Records: map[string]string{"SCHILY.xattr.user.kind": "a\x00b"}},
		{Type: "5", Name: "new/", Mode: 0o755},
		{Type: "5", Name: "opaque/", Mode: 0o755},
		{Type: "0", Name: "opaque/.wh..wh..opq", Mode: 0o600},
		{Type: "0", Name: "opaque/new", Mode: 0o644, Content: "n"},
		{Type: "5", Name: "tmp/", Mode: 0o1777},
		{Type: "5", Name: "var/", Mode: 0o755},
		{Type: "5", Name: "var/cache/", Mode: 0o755},
		{Type: "5", Name: "var/cache/apt/", Mode: 0o755},
		{Type: "5", Name: "var/log/", Mode: 0o755},
	}
	if diff := cmp.Diff(want, read(t, &packed)); diff != "" {
		t.Errorf("layer (-want +got):\n%s", diff)
	}
}
