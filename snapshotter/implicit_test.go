package snapshotter_test

import (
	"archive/tar"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/snapshotter"
)

// owner mounts a view of a snapshot and tells who owns a path in it.
func owner(t *testing.T, s *snapshotter.Snapshotter, name, path string) (uid uint32) {
	t.Helper()
	mounts, err := s.View(t.Context(), "owner "+name, name)
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		var st unix.Stat_t
		err := unix.Lstat(filepath.Join(dir, path), &st)
		uid = st.Uid
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return uid
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// A layer that leaves a directory implicit takes it from the layers below, in each of its chains.
func TestImplicitDirs(t *testing.T) { inForms(t, testImplicitDirs) }

func testImplicitDirs(t *testing.T, form snapshotter.Form) {
	f := newFake()
	root := t.TempDir()
	s := start(t, f, as(form), func(c *snapshotter.Config) { c.Root = root })
	f.implicit["app"] = []string{"srv"}
	images := []pull{
		{s: s, img: f.image("reg/a:1", "red", "app")},
		{s: s, img: f.image("reg/b:1", "blue", "app")},
		{s: s, img: f.image("reg/c:1", "app")},
	}
	for i, base := range []string{"red", "blue"} {
		f.extra[base] = []tar.Header{{Name: "srv", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 1000 + i}}
		pull{s: s, img: f.image("reg/"+base, base)}.all(t)
	}
	tops := make([]string, len(images))
	for i, p := range images {
		tops[i] = p.all(t)
	}
	for i, want := range []uint32{1000, 1001, 0} {
		if got := owner(t, s, tops[i], "srv"); got != want {
			t.Errorf("image %d: srv belongs to %d, want %d", i, got, want)
		}
	}
	if n := len(list(t, root, "layers")); n != 5 {
		t.Errorf("%d trees, want 5", n)
	}
	if left := list(t, root, "staging"); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// containerd would unpack through a link of a lower layer, which a tree on its own cannot: it has to do so.
func TestImplicitDirIsLinkBelow(t *testing.T) { inForms(t, testImplicitDirIsLinkBelow) }

func testImplicitDirIsLinkBelow(t *testing.T, form snapshotter.Form) {
	f := newFake()
	root := t.TempDir()
	s := start(t, f, as(form), func(c *snapshotter.Config) { c.Root = root })
	f.implicit["app"] = []string{"lib"}
	f.extra["base"] = []tar.Header{{Name: "lib", Typeflag: tar.TypeSymlink, Linkname: "usr/lib"}}
	p := pull{s: s, img: f.image("reg/a:1", "base", "app")}
	parent, _, err := p.prepare(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	_, mounts, err := p.prepare(t.Context(), 1, parent)
	if err != nil || len(mounts) != 1 || !slices.ContainsFunc(mounts[0].Options, func(o string) bool { return o[:5] == "upper" }) {
		t.Errorf("mounts %v, error %v; want writable ones", mounts, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if left := list(t, root, "staging"); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
