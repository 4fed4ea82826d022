package layer_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/pierrec/lz4/v4"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
)

var epoch = time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)

// ent is an entry of a tar in a test.
type ent struct {
	name, link string
	typ        byte
	mode       int64
	uid, gid   int
	data       string
	xattrs     map[string]string
	mtime      time.Time
	atime      time.Time
	major      int64
	minor      int64
	size       int64 // only if data is to be shorter than it claims
	format     tar.Format
}

func (e ent) header() *tar.Header {
	if e.typ == tar.TypeXGlobalHeader {
		return &tar.Header{Typeflag: e.typ, Name: e.name, PAXRecords: map[string]string{"comment": "a commit"}}
	}
	h := &tar.Header{
		Name: e.name, Linkname: e.link, Typeflag: e.typ, Mode: e.mode, Uid: e.uid, Gid: e.gid, Size: int64(len(e.data)),
		ModTime: e.mtime, AccessTime: e.atime, Devmajor: e.major, Devminor: e.minor, Format: e.format,
	}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
	}
	if h.Mode == 0 {
		h.Mode = 0o644
	}
	if h.ModTime.IsZero() {
		h.ModTime = epoch
	}
	if h.Format == 0 {
		h.Format = tar.FormatPAX
	}
	if e.size > 0 {
		h.Size = e.size
	}
	for k, v := range e.xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	return h
}

func makeTar(t testing.TB, ents ...ent) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range ents {
		if err := w.WriteHeader(e.header()); err != nil {
			t.Fatalf("entry %q: %v", e.name, err)
		}
		if _, err := w.Write([]byte(e.data)); err != nil {
			t.Fatal(err)
		}
	}
	_ = w.Close() // complains about content that a test left out on purpose
	return buf.Bytes()
}

func dir(name string, mode int64) ent { return ent{name: name, typ: tar.TypeDir, mode: mode} }
func file(name, data string) ent      { return ent{name: name, data: data} }
func link(name, target string) ent {
	return ent{name: name, typ: tar.TypeSymlink, link: target, mode: 0o777}
}
func hard(name, target string) ent { return ent{name: name, typ: tar.TypeLink, link: target} }

func compress(t testing.TB, format layer.Format, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	switch format {
	case layer.Gzip:
		level := gzip.DefaultCompression
		if len(data) > 100<<20 { // which under the race detector takes a while
			level = gzip.BestSpeed
		}
		w, err := gzip.NewWriterLevel(&buf, level)
		if err != nil {
			t.Fatal(err)
		}
		must(t, w.Close, w, data)
	case layer.Zstd:
		w, err := zstd.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		must(t, w.Close, w, data)
	case layer.LZ4:
		w := lz4.NewWriter(&buf)
		must(t, w.Close, w, data)
	default:
		return data
	}
	return buf.Bytes()
}

func must(t testing.TB, done func() error, w interface{ Write([]byte) (int, error) }, data []byte) {
	t.Helper()
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := done(); err != nil {
		t.Fatal(err)
	}
}

func specOf(blob, tarball []byte) layer.Spec {
	return layer.Spec{Digest: digest.FromBytes(blob), DiffID: digest.FromBytes(tarball), Size: int64(len(blob))}
}

func newUnpacker(t testing.TB, cfg layer.Config) *layer.Unpacker {
	t.Helper()
	u, err := layer.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func unpackTar(t testing.TB, tarball []byte, into string) (*layer.Result, error) {
	t.Helper()
	return newUnpacker(t, layer.Config{}).Unpack(t.Context(), bytes.NewReader(tarball), specOf(tarball, tarball), into)
}

// forms are the ways to unpack a layer below an empty directory. What is unpacked has the name "fs"; an image may be mounted.
var forms = map[string]func(u *layer.Unpacker, ctx context.Context, src io.Reader, spec layer.Spec, where string) (*layer.Result, error){
	"directory": func(u *layer.Unpacker, ctx context.Context, src io.Reader, spec layer.Spec, where string) (*layer.Result, error) {
		into := filepath.Join(where, "fs")
		if err := os.Mkdir(into, 0o755); err != nil {
			return nil, err
		}
		return u.Unpack(ctx, src, spec, into)
	},
	"image": func(u *layer.Unpacker, ctx context.Context, src io.Reader, spec layer.Spec, where string) (*layer.Result, error) {
		return u.UnpackImage(ctx, src, spec, filepath.Join(where, "fs"))
	},
}

// mountImage mounts an image until the test ends. It fails where the kernel can mount images from files and this one is wrong.
func mountImage(t testing.TB, image string) (root string) {
	t.Helper()
	root = t.TempDir()
	if err := unix.Mount(image, root, "erofs", unix.MS_RDONLY, ""); err != nil {
		if err == unix.ENODEV || err == unix.ENOTBLK || err == unix.EPERM {
			t.Skipf("this kernel, or this user, cannot mount EROFS from a file: %v", err)
		}
		t.Fatalf("mount image: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	return root
}

// describe lists a tree, all that a container could tell apart; inodes are numbered by their first name.
func describe(t testing.TB, root string, times func(rel string) bool) map[string]string {
	t.Helper()
	out := map[string]string{}
	inodes := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		var s strings.Builder
		if rel != "." {
			fmt.Fprintf(&s, "mode=%o uid=%d gid=%d rdev=%x", st.Mode, st.Uid, st.Gid, st.Rdev)
			if times(rel) {
				fmt.Fprintf(&s, " mtime=%d.%d", st.Mtim.Sec, st.Mtim.Nsec)
				if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Mode&unix.S_IFMT != unix.S_IFLNK { // reading moves it
					fmt.Fprintf(&s, " atime=%d.%d", st.Atim.Sec, st.Atim.Nsec)
				}
			}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			first, ok := inodes[st.Ino]
			if !ok {
				first = rel
				inodes[st.Ino] = rel
			}
			fmt.Fprintf(&s, " nlink=%d first=%s", st.Nlink, first)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NOATIME, 0)
			if err != nil {
				return err
			}
			data, err := io.ReadAll(f)
			f.Close()
			if err != nil {
				return err
			}
			fmt.Fprintf(&s, " size=%d sum=%s", st.Size, digest.FromBytes(data).Encoded()[:16])
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&s, " -> %s", target)
		}
		s.WriteString(xattrsOf(t, p))
		out[rel] = s.String()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func xattrsOf(t testing.TB, p string) string {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		if err == syscall.ENOTSUP {
			return ""
		}
		t.Fatal(err)
	}
	names := strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	var s strings.Builder
	for _, name := range names {
		if name == "" {
			continue
		}
		v := make([]byte, 1<<16)
		m, err := unix.Lgetxattr(p, name, v)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&s, " %s=%q", name, v[:m])
	}
	return s.String()
}
