package snapshotter_test

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/snapshotter"
)

func TestFormIsChecked(t *testing.T) {
	needRoot(t)
	f := newFake()
	_, err := snapshotter.New(snapshotter.Config{Root: t.TempDir(), Registry: f, Layers: f, Form: "squashfs"})
	if err == nil || !strings.Contains(err.Error(), "erofs") {
		t.Errorf("error %v, want one that says what there is", err)
	}
}

// A file system that images cannot be mounted from, which tmpfs is: auto keeps directories, and who wants images is told.
func TestNoImagesHere(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	if err := unix.Mount("test", root, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	f := newFake()
	in := func(c *snapshotter.Config) { c.Root = root }
	if _, err := snapshotter.New(snapshotter.Config{Root: root, Registry: f, Layers: f, Form: snapshotter.FormErofs}); err == nil || !strings.Contains(err.Error(), "EROFS") {
		t.Fatalf("error %v, want one that names EROFS", err)
	}
	s := start(t, f, in)
	if got := files(t, s, pull{s: s, img: f.image("reg/a:1", "base")}.all(t)); !slices.Equal(got, []string{"base"}) {
		t.Errorf("files %q", got)
	}
	if images := glob(t, root, "layers/*/layer.erofs"); len(images) > 0 {
		t.Errorf("images %q", images)
	}
	if left := list(t, root, "staging"); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func glob(t *testing.T, root, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(root, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// Layers of both forms can be below one root, and in one image; a layer that cannot be an image is a directory.
func TestBothForms(t *testing.T) {
	f := newFake()
	root := t.TempDir()
	in := func(c *snapshotter.Config) { c.Root = root }
	old := start(t, f, in, as(snapshotter.FormDirectory))
	pull{s: old, img: f.image("reg/a:1", "base")}.all(t)
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	s := start(t, f, in, as(snapshotter.FormErofs))
	f.noImage["odd"] = layer.ErrNoImage
	top := pull{s: s, img: f.image("reg/b:1", "base", "app", "odd")}.all(t)
	if got := files(t, s, top); !slices.Equal(got, []string{"app", "base", "odd"}) {
		t.Errorf("files %q", got)
	}
	if images := glob(t, root, "layers/*/layer.erofs"); len(images) != 1 {
		t.Errorf("images %q, want one", images)
	}
	if f.count("odd") != 2 || f.count("base") != 1 {
		t.Errorf("fetched: odd %d times, base %d times", f.count("odd"), f.count("base"))
	}
}

// What a container may do does not depend on the form of its layers: neither devices nor set-user-id bits are taken from it.
func TestMountFlags(t *testing.T) {
	inForms(t, func(t *testing.T, form snapshotter.Form) {
		f := newFake()
		s := start(t, f, as(form))
		f.extra["base"] = []tar.Header{{Name: "dev", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "dev/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}}
		base := pull{s: s, img: f.image("reg/a:1", "base")}.all(t)
		view, err := s.View(t.Context(), "view", base) // a bind of the one layer
		if err != nil {
			t.Fatal(err)
		}
		container, err := s.Prepare(t.Context(), "container", base)
		if err != nil {
			t.Fatal(err)
		}
		for _, mounts := range [][]mount.Mount{view, container} {
			if err := mount.WithTempMount(t.Context(), mounts, func(dir string) error {
				var st unix.Statfs_t
				if err := unix.Statfs(dir, &st); err != nil {
					return err
				}
				if st.Flags&(unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC) != 0 {
					t.Errorf("%v: flags %x", mounts, st.Flags)
				}
				return os.WriteFile(filepath.Join(dir, "dev/null"), []byte("x"), 0)
			}); err != nil {
				t.Errorf("%v: %v", mounts, err)
			}
		}
	})
}

// Two files of a container are one only if they are: inode numbers of two images are alike.
func TestInodesAreTold(t *testing.T) {
	inForms(t, func(t *testing.T, form snapshotter.Form) {
		f := newFake()
		s := start(t, f, as(form))
		top := pull{s: s, img: f.image("reg/a:1", "a", "b", "c")}.all(t)
		mounts, err := s.Prepare(t.Context(), "container", top)
		if err != nil {
			t.Fatal(err)
		}
		if err := mount.WithTempMount(t.Context(), mounts, func(dir string) error {
			devices, inodes := map[uint64]bool{}, map[uint64]bool{}
			for _, name := range []string{".", "a", "b", "c"} {
				var st unix.Stat_t
				if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
					return err
				}
				devices[st.Dev], inodes[st.Ino] = true, true
			}
			if len(devices) != 1 || len(inodes) != 4 {
				t.Errorf("devices %v, inodes %v", devices, inodes)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})
}

// More layers than fit into the options of one mount by their whole paths.
func TestManyLayers(t *testing.T) {
	inForms(t, func(t *testing.T, form snapshotter.Form) {
		f := newFake()
		s := start(t, f, as(form))
		var words []string
		for i := range 120 {
			words = append(words, fmt.Sprintf("w%03d", i))
		}
		top := pull{s: s, img: f.image("reg/a:1", words...)}.all(t)
		if diff := cmp.Diff(words, files(t, s, top)); diff != "" {
			t.Error(diff)
		}
	})
}

// A container goes on when the snapshotter restarts, and when its layer's image goes while it still runs.
func TestRunningContainer(t *testing.T) {
	inForms(t, func(t *testing.T, form snapshotter.Form) {
		f := newFake()
		root := t.TempDir()
		in := func(c *snapshotter.Config) { c.Root = root }
		s := start(t, f, in, as(form))
		top := pull{s: s, img: f.image("reg/a:1", "base", "app")}.all(t)
		mounts, err := s.Prepare(t.Context(), "container", top)
		if err != nil {
			t.Fatal(err)
		}
		if err := mount.WithTempMount(t.Context(), mounts, func(dir string) error {
			read := func() {
				t.Helper()
				if got, err := os.ReadFile(filepath.Join(dir, "base")); err != nil || string(got) != "base" {
					t.Errorf("read %q, error %v", got, err)
				}
			}
			before := mountsBelow(t, root)
			if err := s.Close(); err != nil {
				return err
			}
			read()
			s = start(t, f, in, as(form))
			if diff := cmp.Diff(before, mountsBelow(t, root)); diff != "" {
				t.Errorf("mounts before and after a restart: %s", diff)
			}
			read()
			if form == snapshotter.FormErofs { // of a directory the overlay would lose its files
				for _, name := range []string{"container", top, f.images["reg/a:1"].Layers[0].DiffID.String()} {
					if err := s.Remove(t.Context(), name); err != nil {
						return err
					}
				}
				if err := s.Cleanup(t.Context()); err != nil {
					return err
				}
				if left := list(t, root, "layers"); len(left) > 0 {
					t.Errorf("trees %q are left", left)
				}
				read()
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})
}

// An image that the disk spoilt: what needs it says so, by name, and nothing else suffers.
func TestBrokenImage(t *testing.T) {
	f := newFake()
	root := t.TempDir()
	in := func(c *snapshotter.Config) { c.Root = root }
	s := start(t, f, in, as(snapshotter.FormErofs))
	bad, good := pull{s: s, img: f.image("reg/a:1", "bad")}.all(t), pull{s: s, img: f.image("reg/b:1", "good")}.all(t)
	tree := glob(t, root, "layers/*/fs/bad")
	if len(tree) != 1 {
		t.Fatalf("trees %q", tree)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	unmountBelow(t, root)
	dir := filepath.Dir(filepath.Dir(tree[0]))
	if err := os.Truncate(filepath.Join(dir, "layer.erofs"), 100); err != nil {
		t.Fatal(err)
	}
	s = start(t, f, in, as(snapshotter.FormErofs))
	if _, err := s.Prepare(t.Context(), "one", bad); err == nil || !strings.Contains(err.Error(), filepath.Base(dir)) {
		t.Errorf("error %v, want one that names the layer", err)
	}
	if got := files(t, s, good); !slices.Equal(got, []string{"good"}) {
		t.Errorf("files %q", got)
	}
	// Its snapshot goes, and the layer can be had again.
	if err := s.Remove(t.Context(), bad); err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := files(t, s, pull{s: s, img: f.images["reg/a:1"]}.all(t)); !slices.Equal(got, []string{"bad"}) {
		t.Errorf("files %q", got)
	}
}

// An image that was mounted when the process was killed, but had no name yet.
func TestMountedInStaging(t *testing.T) {
	f := newFake()
	root := t.TempDir()
	in := func(c *snapshotter.Config) { c.Root = root }
	s := start(t, f, in, as(snapshotter.FormErofs))
	pull{s: s, img: f.image("reg/a:1", "base")}.all(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	tree := glob(t, root, "layers/*")[0]
	if err := os.Rename(tree, filepath.Join(root, "staging", "x")); err != nil {
		t.Fatal(err)
	}
	again := start(t, newFake(), in, as(snapshotter.FormErofs))
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if left := append(list(t, root, "staging"), list(t, root, "trash")...); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if left := mountsBelow(t, root); len(left) > 0 {
		t.Errorf("still mounted: %q", left)
	}
}
