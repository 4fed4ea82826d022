package instance_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/hearth-serverless/hearth/instance"
)

// read reads a file of a mount that nobody sees.
func read(tree *os.File, name string) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d/%s", tree.Fd(), name))
	return string(text), err
}

// TestView: clones of a package's mount outlive it, cannot be written to and are seen by nobody.
func TestView(t *testing.T) {
	if os.Geteuid() != 0 { // the one probe: as root nothing skips
		t.Skip("mounting wants root")
	}
	source, other := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "main.py"), []byte("code"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]mount.Mount{
		"of one layer":      {Type: "bind", Source: source, Options: []string{"ro", "rbind"}},
		"of several layers": {Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + source + ":" + other}},
	} {
		t.Run(name, func(t *testing.T) { testView(t, m) })
	}
}

func testView(t *testing.T, m mount.Mount) {
	scratch := t.TempDir()
	v, err := instance.NewView([]mount.Mount{m}, scratch)
	if err != nil {
		t.Fatal(err)
	}
	first, err := v.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := read(first, "main.py"); got != "code" {
		t.Errorf("got %q, %v", got, err)
	}
	err = os.WriteFile(fmt.Sprintf("/proc/self/fd/%d/new", first.Fd()), nil, 0o644)
	if err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("writing: %v", err)
	}
	if seen, _ := os.ReadDir(scratch); len(seen) > 0 {
		t.Error("the mount can be seen")
	}
}

func TestSecretsTree(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting wants root")
	}
	tree, err := instance.SecretsTree(map[string][]byte{"key": []byte("hush"), ".netrc": nil, "large": make([]byte, 200<<10)})
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if got, err := read(tree, "key"); got != "hush" {
		t.Errorf("got %q, %v", got, err)
	}
	info, err := os.Stat(fmt.Sprintf("/proc/self/fd/%d/key", tree.Fd()))
	if err != nil || info.Mode() != 0o444 {
		t.Errorf("got %v, %v", info, err)
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/self/fd/%d/new", tree.Fd()), nil, 0o644); err == nil {
		t.Error("it can be written to")
	}
}

// TestCopyTree is what happens where mounts cannot be moved: a copy, below the container's root whatever links lie there.
func TestCopyTree(t *testing.T) {
	source, root, outside := t.TempDir(), t.TempDir(), t.TempDir()
	err := errors.Join(
		os.MkdirAll(filepath.Join(source, "lib", "deep"), 0o755),
		os.WriteFile(filepath.Join(source, "main"), []byte("program"), 0o755),
		os.WriteFile(filepath.Join(source, "lib", "deep", "x.py"), []byte("x"), 0o644),
		os.Symlink("../main", filepath.Join(source, "lib", "link")),
		os.Symlink(outside, filepath.Join(source, "out")),
		os.Mkdir(filepath.Join(root, "workspace"), 0o755),
		os.Symlink(outside, filepath.Join(root, "evil")),
	)
	if err != nil {
		t.Fatal(err)
	}
	for path, fails := range map[string]bool{"/workspace": false, "/evil": true, "/evil/below": true} {
		if err := instance.CopyTree(t.Context(), root, path, source); (err != nil) != fails {
			t.Errorf("%s: %v", path, err)
		}
	}
	to := filepath.Join(root, "workspace")
	if text, err := os.ReadFile(filepath.Join(to, "lib", "link")); string(text) != "program" {
		t.Errorf("got %q, %v", text, err)
	}
	if info, err := os.Stat(filepath.Join(to, "main")); err != nil || info.Mode() != 0o755 {
		t.Errorf("got %v, %v", info, err)
	}
	if text, err := os.ReadFile(filepath.Join(to, "lib", "deep", "x.py")); string(text) != "x" {
		t.Errorf("got %q, %v", text, err)
	}
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("%s was made outside the root", left[0].Name())
	}
}
