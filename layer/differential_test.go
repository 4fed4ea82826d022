package layer_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
)

// capNetBind is a security.capability value as tar carries it.
const capNetBind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// torture holds layers, lowest first, with everything that a layer can do that containerd unpacks.
func torture() [][]ent {
	long := strings.Repeat("long-name-component/", 12) + strings.Repeat("x", 200)
	big := strings.Repeat("0123456789abcdef", 200_000) // over several blocks
	base := []ent{
		dir("./", 0o700), {name: "etc", typ: tar.TypeDir, mode: 0o755, uid: 7, gid: 8, mtime: time.Unix(1, 999)},
		{name: "srv/data", typ: tar.TypeDir, mode: 0o2775, uid: 12, gid: 34, xattrs: map[string]string{"user.tag": "v", "security.hearth": "s"}},
		{name: "srv/data/inner", typ: tar.TypeDir, mode: 0o1777, uid: 1000, gid: 1000},
		{name: "opt/tool", typ: tar.TypeDir, mode: 0o711, uid: 5, gid: 5}, file("opt/tool/old", "old"), file("opt/file-then-dir", "f"),
		dir("usr/lib", 0o755), link("lib", "usr/lib"), link("abs", "/usr/lib"), file("usr/lib/base", "base"),
		{name: "private", typ: tar.TypeDir, mode: 0o000}, file("private/in", "x"),
	}
	mixed := []ent{
		{name: "pax_global_header", typ: tar.TypeXGlobalHeader, format: tar.FormatPAX},
		dir("./", 0o755), dir("usr", 0o755), dir("usr/lib", 0o755), dir("usr/bin", 0o755),
		file("./usr/lib/plain", "hello"), file("usr/lib/empty", ""), file("usr/lib/big", big), file("usr//lib/./slashes", "s"),
		file("usr/lib/up/../beside", "inner dots"),
		{name: "usr/bin/suid", data: "suid", mode: 0o4755, uid: 0, gid: 0}, {name: "usr/bin/suidother", data: "suid", mode: 0o6751, uid: 3, gid: 4},
		{name: "usr/bin/sticky", data: "s", mode: 0o1644}, {name: "usr/bin/none", data: "s", mode: 0o7000},
		{name: "usr/bin/cap", data: "cap", mode: 0o755, uid: 9, xattrs: map[string]string{"security.capability": capNetBind, "user.a": "b"}},
		{name: "usr/bin/trusted", data: "t", xattrs: map[string]string{"trusted.overlay.opaque": "y", "user.ok": "1"}},
		{name: "usr/bin/unknown-ns", data: "t", xattrs: map[string]string{"nonsense.attr": "y"}},
		{name: "usr/lib/bigids", data: "i", uid: 3_000_000_000, gid: 4_000_000_000},
		{name: "usr/lib/ns", data: "n", mtime: time.Unix(1_600_000_000, 123_456_789), atime: time.Unix(1_700_000_000, 987_654_321)},
		{name: "usr/lib/atime-older", data: "n", mtime: time.Unix(1_600_000_000, 5), atime: time.Unix(1_500_000_000, 6)},
		{name: "usr/lib/before-1970", data: "n", mtime: time.Unix(-500, 0)}, {name: "usr/lib/far", data: "n", mtime: time.Unix(1<<34, 0)},
		file(long, "long"), link("longlink", strings.Repeat("t/", 300)+"t"),
		{name: "gnu/" + long, data: "gnu long", format: tar.FormatGNU},
		link("lib", "usr/lib"), file("lib/through-link", "in usr/lib"), dir("lib/dir-through-link", 0o750), file("lib/dir-through-link/f", "f"),
		link("lib64", "../../usr/lib"), link("absolute", "/usr/lib"), file("absolute/x", "by absolute link"), link("chain", "lib"), file("chain/y", "chain"),
		link("later", "made/later"), file("later/z", "the link's target is made on the way"), link("dangling", "nowhere/at/all"),
		link("usr/back", "../usr/lib"), file("usr/back/w", "back and forth"),
		hard("usr/lib/hard", "usr/lib/plain"), hard("usr/lib/hardbig", "./usr/lib/big"), hard("hardlink-by-link", "lib/plain"), hard("hard-to-link", "lib"),
		{name: "usr/bin/cap2", typ: tar.TypeLink, link: "usr/bin/cap", mode: 0o711, uid: 10, xattrs: map[string]string{"security.capability": capNetBind}},
		{name: "usr/bin/suid2", typ: tar.TypeLink, link: "usr/bin/suid", mode: 0o4755},
		{name: "sym-owner", typ: tar.TypeSymlink, link: "x", mode: 0o777, uid: 44, gid: 55, xattrs: map[string]string{"user.ignored": "x", "security.hearth": "kept"}},
		{name: "dev/null", typ: tar.TypeChar, mode: 0o666, major: 1, minor: 3}, {name: "dev/sda", typ: tar.TypeBlock, mode: 0o660, gid: 6, major: 8, minor: 300},
		{name: "dev/fifo", typ: tar.TypeFifo, mode: 0o4622, uid: 2}, {name: "dev/zero", typ: tar.TypeChar, mode: 0o600, major: 0, minor: 0},
		hard("dev/null2", "dev/null"),
		// One entry in the place of another.
		file("re/file", "one"), file("re/file", "two"), dir("re/dir", 0o755), file("re/dir/a", "a"), file("re/dir/sub/b", "b"), file("re/dir", "now a file"),
		file("re/f2d", "f"), dir("re/f2d", 0o700), file("re/f2d/in", "in"), link("re/l2d", "elsewhere"), dir("re/l2d", 0o755), file("re/l2d/in", "in"),
		link("re/l2f", "file"), file("re/l2f", "f"), file("re/f2l", "f"), link("re/f2l", "dir"), dir("re/twice", 0o700), file("re/twice/kept", "kept"),
		{name: "re/twice", typ: tar.TypeDir, mode: 0o751, uid: 1, mtime: time.Unix(77, 0)},
		file("re/hl", "x"), hard("re/hl2", "re/hl"), file("re/hl2", "own inode again"), link("re/swap", "/usr/bin"), file("re/swap/one", "1"), link("re/swap2", "../usr/lib"),
		dir("re/d2l", 0o755), file("re/d2l/lost", "x"), link("re/d2l", "../usr/lib"), file("re/d2l/found", "y"),
		// White-outs.
		file("opt/.wh.gone", ""), dir("wh", 0o755), {name: "wh/.wh..wh..opq", uid: 3}, file("wh/new", "n"), {name: "wh/.wh.owned", uid: 5, gid: 6}, dir("wh/.wh.dirtype", 0o755),
		file("back/.wh.again", ""), file("back/again", "came back"), file("backd/.wh.again", ""), dir("backd/again", 0o711), file("imp/deep/.wh..wh..opq", ""),
		{name: ".wh..wh.odd/ordinary"}, // AUFS's own, skipped by us; see below
		file("zz/.wh.middle/x", "not a white-out"),
	}
	upper := []ent{
		file("srv/data/inner/leaf", "leaf"), file("opt/tool/new", "new"), file("opt/file-then-dir/x", "x"), file("nobody/has/this", "y"),
		file("private/out", "o"), file("lib/real", "lib is a link below"), file("usr/lib/.wh.base", ""), file("etc/conf.d/z", "z"),
	}
	return [][]ent{base, mixed, upper}
}

func TestUnpackIsContainerds(t *testing.T) {
	for _, where := range []string{t.TempDir(), shm(t)} {
		var theirs, ours []string // parents, nearest first
		for i, ents := range torture() {
			name := string(rune('a' + i))
			a, b := filepath.Join(where, "containerd-"+name), filepath.Join(where, "hearth-"+name)
			mkdirs(t, a, b)
			aufsless := slices.DeleteFunc(slices.Clone(ents), func(e ent) bool { return strings.HasPrefix(e.name, ".wh..wh.") })
			_, err := archive.Apply(t.Context(), a, bytes.NewReader(makeTar(t, aufsless...)),
				archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(theirs))
			if err != nil {
				t.Fatalf("containerd: %v", err)
			}
			res, err := unpackTar(t, makeTar(t, ents...), b)
			if err != nil {
				t.Fatal(err)
			}
			if err := res.AdoptImplicitDirs(b, ours); err != nil {
				t.Fatal(err)
			}
			timed := func(rel string) bool {
				// containerd's white-outs, and its directories without an entry, have the time of the unpacking.
				var st syscall.Stat_t
				if err := syscall.Lstat(filepath.Join(a, rel), &st); err != nil {
					t.Fatal(err)
				}
				return !slices.Contains(res.ImplicitDirs, rel) && !(st.Mode&syscall.S_IFMT == syscall.S_IFCHR && st.Rdev == 0)
			}
			if diff := cmp.Diff(describe(t, a, timed), describe(t, b, timed)); diff != "" {
				t.Errorf("layer %s in %s (-containerd +hearth):\n%s", name, where, diff)
			}
			theirs, ours = append([]string{a}, theirs...), append([]string{b}, ours...)
		}
	}
}

func TestAdoptImplicitDirs(t *testing.T) {
	lower := t.TempDir()
	if _, err := unpackTar(t, makeTar(t, ent{
		name: "a/b", typ: tar.TypeDir, mode: 0o2751, uid: 3, gid: 4, mtime: time.Unix(1234, 5678), xattrs: map[string]string{"user.x": strings.Repeat("v", 200)},
	}), lower); err != nil {
		t.Fatal(err)
	}
	tarball := makeTar(t, file("a/b/c/d", "x"), file("a/b/.wh..wh..opq", ""))
	for form, unpack := range forms {
		t.Run(form, func(t *testing.T) {
			where := t.TempDir()
			res, err := unpack(newUnpacker(t, layer.Config{}), t.Context(), bytes.NewReader(tarball), specOf(tarball, tarball), where)
			if err != nil {
				t.Fatal(err)
			}
			if want := []string{"a", "a/b", "a/b/c"}; !slices.Equal(res.ImplicitDirs, want) {
				t.Fatalf("implicit directories: got %q, want %q", res.ImplicitDirs, want)
			}
			tree := filepath.Join(where, "fs")
			if err := res.AdoptImplicitDirs(tree, []string{t.TempDir(), lower}); err != nil {
				t.Fatal(err)
			}
			if form == "image" {
				checkImage(t, tree)
				tree = mountImage(t, tree)
			}
			always := func(string) bool { return true }
			want, got := describe(t, lower, always)["a/b"], describe(t, tree, always)["a/b"]
			if want := strings.Replace(want, " user.x", ` trusted.overlay.opaque="y" user.x`, 1); want != got {
				t.Errorf("adopted directory: got %s, want %s", got, want)
			}
			if got := describe(t, tree, always)["a/b/c/d"]; !strings.Contains(got, "size=1") {
				t.Errorf("its file: %s", got)
			}
		})
	}
	t.Run("no room", func(t *testing.T) {
		if err := unix.Setxattr(filepath.Join(lower, "a/b"), "user.y", make([]byte, 400), 0); err != nil {
			t.Fatal(err)
		}
		tree := filepath.Join(t.TempDir(), "image")
		res, err := newUnpacker(t, layer.Config{}).UnpackImage(t.Context(), bytes.NewReader(tarball), specOf(tarball, tarball), tree)
		if err != nil {
			t.Fatal(err)
		}
		if err := res.AdoptImplicitDirs(tree, []string{lower}); !errors.Is(err, layer.ErrNoImage) {
			t.Errorf("got error %v, want ErrNoImage", err)
		}
	})
}

func TestResultCounts(t *testing.T) {
	into := t.TempDir()
	res, err := unpackTar(t, makeTar(t, dir("a", 0o755), file("a/f", strings.Repeat("x", 10000)), hard("a/g", "a/f"), link("l", "a"), file("i/.wh.x", "")), into)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := res.Inodes, int64(len(describe(t, into, func(string) bool { return false }))-2); got != want { // the root, the hard link
		t.Errorf("inodes: got %d, want %d", got, want)
	}
	if res.Bytes < 10000 {
		t.Errorf("bytes on disk: got %d", res.Bytes)
	}
	for name, s := range map[string]layer.Stage{"fetch": res.Timings.Fetch, "tar": res.Timings.Tar, "write": res.Timings.Write} {
		if s.Start.IsZero() || s.End.Before(s.Start) || s.Busy < 0 || s.Busy > 4*s.End.Sub(s.Start)+time.Second {
			t.Errorf("stage %s: %+v", name, s)
		}
	}
}

func mkdirs(t testing.TB, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := os.Mkdir(n, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// shm gives a directory in memory.
func shm(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("/dev/shm", "hearth-layer-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(d) })
	return d
}
