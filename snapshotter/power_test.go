package snapshotter_test

import (
	"crypto/rand"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/snapshotter"
)

// TestPowerCut cuts the power after each layer that was prepared: what had not reached the disk is lost. A disk is a file here, and
// a copy of the file is what the next boot finds. Every layer that containerd was told of has to be there whole.
func TestPowerCut(t *testing.T) {
	inForms(t, func(t *testing.T, form snapshotter.Form) {
		s := newShop()
		img := s.sell(t, "reg/a:1", noise(1, 300_000, 1), noise(2, 900_000, 2), noise(3, 100_000, 1))
		root := disk(t, "ext4", 64)
		sn := startReal(t, s, root, as(form))
		top := ""
		for i := range img.Layers {
			name, mounts, err := pull{s: sn, img: img}.prepare(t.Context(), i, top)
			if err != nil || mounts != nil {
				t.Fatalf("layer %d: %v, %v", i, mounts, err)
			}
			top = name
			booted := cutLosing(t, root)
			after := startReal(t, s, booted, as(form))
			if diff := cmp.Diff(contents(t, sn, top), contents(t, after, top)); diff != "" {
				t.Errorf("after layer %d (-before +after):\n%s", i, diff)
			}
		}
	})
}

// cutLosing cuts the power when something that was just written has not reached the disk: without that a cut shows nothing. The
// kernel, or anybody who syncs all disks, may be faster, but not each time.
func cutLosing(t *testing.T, root string) string {
	t.Helper()
	for range 20 {
		name := rand.Text()
		if err := os.WriteFile(filepath.Join(root, name), make([]byte, 64<<10), 0o600); err != nil {
			t.Fatal(err)
		}
		booted := cutPower(t, root)
		if text, _ := os.ReadFile(filepath.Join(booted, name)); len(text) == 0 {
			return booted
		}
	}
	t.Fatal("no cut has lost anything")
	return ""
}

// cutPower mounts what is on the disk below root at this moment, and returns where.
func cutPower(t *testing.T, root string) string {
	t.Helper()
	dir := t.TempDir()
	image, booted := filepath.Join(dir, "image"), filepath.Join(dir, "disk")
	text, err := os.ReadFile(filepath.Join(filepath.Dir(root), "image"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(image, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(booted, 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, "mount", "-o", "loop", image, booted)
	t.Cleanup(func() { unmount(t, booted) })
	return booted
}

// contents are the digests of a committed snapshot's files.
func contents(t *testing.T, s *snapshotter.Snapshotter, name string) map[string]digest.Digest {
	t.Helper()
	mounts, err := s.View(t.Context(), "contents", name)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]digest.Digest{}
	err = mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			found[d.Name()] = digest.FromBytes(text)
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "contents"); err != nil {
		t.Fatal(err)
	}
	return found
}
