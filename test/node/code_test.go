package node_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/internal/codepack"
	"github.com/hearth-serverless/hearth/registry"
)

// codeFolder has code with names that are hard to carry, and the tree that a node has to make of it.
func codeFolder(t *testing.T) (dir string, want map[string]string) {
	t.Helper()
	const root = " owner 0:0 rdev 0"
	dir, want = t.TempDir(), map[string]string{".": "mode 40755" + root}
	folder := func(name string) {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		for ; name != "."; name = filepath.Dir(name) {
			want[name] = "mode 40755" + root + " mtime 0.000000000"
		}
	}
	file := func(name, content string, mode os.FileMode, packed string) {
		folder(filepath.Dir(name))
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		want[name] = fmt.Sprintf("mode %s%s mtime 0.000000000 nlink 1 size %d %s", packed, root, len(content), digest.FromString(content))
	}
	link := func(name, to string) {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		want[name] = "mode 120777" + root + " mtime 0.000000000 -> " + to
	}
	file("main.py", "def main(request): return 'hello'\n", 0o600, "100644")
	file("bin/run", "#!/bin/sh\n", 0o750, "100755")
	file("big", strings.Repeat("several frames of it ", 150_000), 0o644, "100644")
	file("empty", "", 0o400, "100644")
	file("-rf \"new\nline\" ünï\t$(x) `y` \\", "x", 0o666, "100644")
	file(strings.Repeat("deep/", 60)+strings.Repeat("n", 255), "x", 0o600, "100644")
	file(strings.Repeat("d", 99)+"/"+strings.Repeat("f", 100), "x", 0o600, "100644")
	folder("nothing/in it")
	link("bin/up", "../main.py")
	link("dangling", "nothing/there")
	link("folder", "bin")
	for left, content := range map[string]string{codepack.IgnoreFile: "*.log\n", "a.log": "x"} {
		if err := os.WriteFile(filepath.Join(dir, left), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, want
}

// TestPullCode pulls a code package with our snapshotter, and with containerd's own: both have the folder's tree.
func TestPullCode(t *testing.T) {
	dir, want := codeFolder(t)
	bothPaths(t, func(t *testing.T, n *pullNode) {
		ref := n.pushCode(t, dir)
		if err := n.pull(t, ref, nil); err != nil {
			t.Fatal(err)
		}
		parsed, err := name.ParseReference(ref, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		img, err := remote.Image(parsed)
		if err != nil {
			t.Fatal(err)
		}
		if present := n.blobsPresent(t, img); present != 0 {
			t.Errorf("%d blobs are in the content store: it fell back", present)
		}
		for who, trees := range map[string][]map[string]string{"hearth": n.trees(t, n.context(t), "hearth", img), "containerd": n.reference(t, ref, img)} {
			if len(trees) != 1 {
				t.Fatalf("%s: %d layers", who, len(trees))
			}
			if diff := cmp.Diff(want, trees[0]); diff != "" {
				t.Errorf("%s: -folder +tree\n%s", who, diff)
			}
		}
	})
}

// pushCode packs a folder into the node's registry.
func (n *pullNode) pushCode(t *testing.T, dir string) (ref string) {
	t.Helper()
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	tree, err := codepack.Open(dir, codepack.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	var done atomic.Int64
	packed, err := tree.Pack(t.Context(), codepack.Python, "main.main", &done)
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	ref, err = packed.Push(t.Context(), client, n.registry.Listener.Addr().String()+"/code/hello", &done)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}
