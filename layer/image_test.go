package layer_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
)

// acl is a POSIX access control list as an extended attribute: tag, permissions and id of each entry.
func acl(entries ...[3]uint32) string {
	b := []byte{2, 0, 0, 0}
	for _, e := range entries {
		b = append(b, byte(e[0]), byte(e[0]>>8), byte(e[1]), byte(e[1]>>8), byte(e[2]), byte(e[2]>>8), byte(e[2]>>16), byte(e[2]>>24))
	}
	return string(b)
}

// corners are layers that an image stores in special ways.
func corners() [][]ent {
	const none = 1<<32 - 1
	full := acl([3]uint32{1, 7, none}, [3]uint32{2, 5, 33}, [3]uint32{4, 5, 77}, [3]uint32{8, 4, 44}, [3]uint32{16, 5, none}, [3]uint32{32, 1, 0})
	trivial := acl([3]uint32{1, 6, none}, [3]uint32{4, 4, none}, [3]uint32{32, 0, none})
	many := []ent{dir("d", 0o755), dir("-before-dot", 0o711), file(".!between", "dots"), file("..after", "x")}
	for i := range 700 {
		many = append(many, file(fmt.Sprintf("d/%s%d", strings.Repeat("n", i%240), i), ""), dir(fmt.Sprintf("d/sub%d", i%97), 0o755))
	}
	var sizes []ent
	rnd := rand.New(rand.NewPCG(3, 4))
	for _, n := range []int{0, 1, 63, 3071, 3072, 3073, 3999, 4031, 4032, 4033, 4095, 4096, 4097, 7000, 8191, 8192, 65535, 65536, 65537, 69631, 131072, 524288, 524289, 3 << 20} {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		sizes = append(sizes, file(fmt.Sprintf("size%d", n), string(b)), link(fmt.Sprintf("link%d", n), strings.Repeat("l", min(n+1, 4000))))
	}
	attrs := []ent{
		{name: "acl", data: "x", mode: 0o640, xattrs: map[string]string{"system.posix_acl_access": full}},
		{name: "acl-trivial", data: "x", mode: 0o640, xattrs: map[string]string{"system.posix_acl_access": trivial}},
		{name: "acl-none", data: "x", mode: 0o640, xattrs: map[string]string{"system.posix_acl_access": acl()}},
		{name: "acl-dir", typ: tar.TypeDir, mode: 0o2770, xattrs: map[string]string{"system.posix_acl_access": full, "system.posix_acl_default": full}},
		{name: "acl-version", data: "x", xattrs: map[string]string{"system.posix_acl_access": "\x03\x00\x00\x00"}},
		{name: "many", data: "x", xattrs: map[string]string{"user.a": "", "user.b": strings.Repeat("v", 900), "security.selinux": "u:r:t\x00", "user.c": "1"}},
		{name: "many-link", typ: tar.TypeLink, link: "many", mode: 0o600, uid: 4, xattrs: map[string]string{"user.b": "short", "user.new": strings.Repeat("n", 300)}},
		{name: "cap", data: strings.Repeat("c", 5000), mode: 0o755, xattrs: map[string]string{"security.capability": capNetBind}},
		{name: "cap-lost", typ: tar.TypeLink, link: "cap", mode: 0o755, gid: 9},
		{name: "cap3", data: "c", xattrs: map[string]string{"security.capability": "\x01\x00\x00\x03" + strings.Repeat("\x00", 16) + "\x05\x00\x00\x00"}},
		{name: "dir", typ: tar.TypeDir, mode: 0o755, xattrs: map[string]string{"user.one": "1", "user.two": "2"}},
		{name: "dir", typ: tar.TypeDir, mode: 0o750, xattrs: map[string]string{"user.two": "zwei", "user.three": "3"}},
		file("dir/.wh..wh..opq", ""),
		file("gone", "1"), hard("gone2", "gone"), hard("gone3", "gone2"), file("gone", "2"), dir("gone3", 0o700),
	}
	return [][]ent{many, sizes, attrs}
}

// An image that is mounted is what the directory is, to the last attribute.
func TestImageIsTheDirectory(t *testing.T) {
	for i, ents := range append(torture(), corners()...) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			tarball := makeTar(t, ents...)
			a, file := filepath.Join(t.TempDir()), filepath.Join(t.TempDir(), "image")
			want, err := unpackTar(t, tarball, a)
			if err != nil {
				t.Fatal(err)
			}
			got, err := newUnpacker(t, layer.Config{}).UnpackImage(t.Context(), bytes.NewReader(tarball), specOf(tarball, tarball), file)
			if err != nil {
				t.Fatal(err)
			}
			checkImage(t, file)
			if diff := cmp.Diff(want.ImplicitDirs, got.ImplicitDirs); diff != "" {
				t.Errorf("implicit directories (-directory +image):\n%s", diff)
			}
			b := mountImage(t, file)
			timed := func(rel string) bool {
				// Those have the time of the unpacking in a directory.
				var st unix.Stat_t
				if err := unix.Lstat(filepath.Join(a, rel), &st); err != nil {
					t.Fatal(err)
				}
				return !slices.Contains(want.ImplicitDirs, rel) && !(st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0)
			}
			mine := describe(t, b, timed)
			if diff := cmp.Diff(withoutAtime(describe(t, a, timed)), withoutAtime(mine)); diff != "" {
				t.Errorf("(-directory +image):\n%s", diff)
			}
			inodes := map[string]bool{}
			for rel := range mine {
				var st unix.Stat_t
				if err := unix.Lstat(filepath.Join(b, rel), &st); err != nil {
					t.Fatal(err)
				}
				inodes[fmt.Sprint(st.Ino)] = true
			}
			if n := int64(len(inodes) - 1); got.Inodes != n {
				t.Errorf("%d inodes counted, %d there", got.Inodes, n)
			}
		})
	}
}

// withoutAtime drops what EROFS does not keep.
func withoutAtime(tree map[string]string) map[string]string {
	for rel, s := range tree {
		if before, after, ok := strings.Cut(s, " atime="); ok {
			_, after, _ = strings.Cut(after, " ")
			tree[rel] = before + " " + after
		}
	}
	return tree
}

// The same tar makes the same image.
func TestImageIsReproducible(t *testing.T) {
	tarball := makeTar(t, torture()[1]...)
	var images [2][]byte
	for i := range images {
		file := filepath.Join(t.TempDir(), "image")
		if _, err := newUnpacker(t, layer.Config{}).UnpackImage(t.Context(), bytes.NewReader(tarball), specOf(tarball, tarball), file); err != nil {
			t.Fatal(err)
		}
		var err error
		if images[i], err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two images of one tar differ")
	}
}

func TestImageSparseFile(t *testing.T) {
	for _, size := range []int64{4100, 3<<20 + 17, 300 << 20} {
		file := filepath.Join(t.TempDir(), "image")
		tarball := sparseTar(t, size)
		blob := compress(t, layer.Gzip, tarball)
		res, err := newUnpacker(t, layer.Config{Limits: layer.Limits{MaxRatio: 1 << 40}}).UnpackImage(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), file)
		if err != nil {
			t.Fatal(err)
		}
		checkImage(t, file)
		if res.Bytes > 200<<10 {
			t.Errorf("the image of 4 bytes in %d takes %d on disk", size, res.Bytes)
		}
		got, err := os.ReadFile(filepath.Join(mountImage(t, file), "dir/holes"))
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size)
		copy(want[4096:], "data")
		if !bytes.Equal(got, want) {
			t.Errorf("content of %d bytes differs", len(got))
		}
	}
}

// A file that hard links add attributes to, until they do not fit beside its content any more, cannot be an image.
func TestNoImage(t *testing.T) {
	tooMany := func() (ents []ent) {
		for i := range 15000 {
			ents = append(ents, file(fmt.Sprintf("a-longer-name-%d-%s", i, strings.Repeat("x", 100)), ""))
		}
		return ents
	}
	for name, ents := range map[string][]ent{
		"names":      tooMany(),
		"attributes": {file("f", strings.Repeat("x", 3000)), {name: "g", typ: tar.TypeLink, link: "f", xattrs: map[string]string{"user.a": strings.Repeat("v", 2000)}}},
		"attribute":  {{name: "f", xattrs: map[string]string{"user.a": strings.Repeat("v", 1<<16)}}},
	} {
		t.Run(name, func(t *testing.T) {
			tarball := makeTar(t, ents...)
			_, err := newUnpacker(t, layer.Config{MemoryBytes: 4 << 20}).
				UnpackImage(t.Context(), bytes.NewReader(tarball), specOf(tarball, tarball), filepath.Join(t.TempDir(), "image"))
			if !errors.Is(err, layer.ErrNoImage) || errors.Is(err, layer.ErrCorrupt) {
				t.Errorf("got error %v, want ErrNoImage", err)
			}
		})
	}
}

// A hard link to what only the layers below can have is nobody's fault, but not for one layer alone.
func TestHardLinkBelow(t *testing.T) {
	for form, unpack := range forms {
		for name, ents := range map[string][]ent{
			"missing":      {hard("h", "nothing")},
			"into nowhere": {hard("h", "no/thing")},
			"taken away":   {dir("d", 0o755), file("d/f", "x"), file("d", "x"), hard("h", "e/../d2/f")},
		} {
			t.Run(form+"/"+name, func(t *testing.T) {
				tarball := makeTar(t, ents...)
				_, err := unpack(newUnpacker(t, layer.Config{}), t.Context(), bytes.NewReader(tarball), specOf(tarball, tarball), t.TempDir())
				if !errors.Is(err, layer.ErrUnsupported) || errors.Is(err, layer.ErrCorrupt) || !strings.Contains(err.Error(), `"h"`) {
					t.Errorf("got error %v, want ErrUnsupported that names the entry", err)
				}
			})
		}
	}
}
