package snapshotter

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// trees is layers/: the unpacked trees, by content. A name that is pinned is not swept.
type trees struct {
	root    string // of the snapshotter
	metrics *metrics

	mu      sync.Mutex               // guards pins and leaving
	pins    map[string]int           // name → users in memory
	leaving map[string]chan struct{} // names on their way to the trash; closed when they are there
}

// treeInfo is a tree's layer.json: what Usage answers without walking the tree.
type treeInfo struct {
	Bytes  int64 `json:"bytes"`  // allocated on disk
	Inodes int64 `json:"inodes"` // the root counted, as containerd does
}

func (i treeInfo) usage() snapshots.Usage { return snapshots.Usage{Size: i.Bytes, Inodes: i.Inodes} }

func newTrees(root string, m *metrics) *trees {
	return &trees{root: root, metrics: m, pins: map[string]int{}, leaving: map[string]chan struct{}{}}
}

// treeName is the name of a layer's tree. chain is empty unless the tree's content depends on the layers below it; 256 bits of it
// are enough, and two long digests are too long for a file name. A colon would separate directories in an overlay's options.
func treeName(diffID, chain digest.Digest) string {
	name := strings.Replace(diffID.String(), ":", "-", 1)
	if chain != "" {
		name += "." + chain.Encoded()[:64]
	}
	return name
}

func (t *trees) path(name string) string { return filepath.Join(t.root, "layers", name) }

// pin keeps name from being swept until the returned function is called, whether there is such a tree or not.
func (t *trees) pin(name string) (unpin func()) {
	t.mu.Lock()
	t.pins[name]++
	leaving := t.leaving[name]
	t.mu.Unlock()
	if leaving != nil {
		<-leaving // so that the caller does not see a tree that is about to go; it takes one rename
	}
	return sync.OnceFunc(func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.pins[name]--; t.pins[name] == 0 {
			delete(t.pins, name)
		}
	})
}

// stat says what is known of a tree, or fs.ErrNotExist. The caller has pinned it.
func (t *trees) stat(name string) (treeInfo, error) {
	var info treeInfo
	data, err := os.ReadFile(filepath.Join(t.path(name), "layer.json"))
	if err != nil {
		return info, err
	}
	if err := json.Unmarshal(data, &info); err != nil {
		return info, fmt.Errorf("read layer.json of %s: %w", name, err)
	}
	return info, nil
}

// stage makes a directory, with an empty fs in it, for a tree in the making.
func (t *trees) stage() (string, error) {
	dir, err := os.MkdirTemp(filepath.Join(t.root, "staging"), "")
	if err != nil {
		return "", fmt.Errorf("make staging directory: %w", err)
	}
	if err := makeDir(filepath.Join(dir, "fs"), 0o755); err != nil {
		return dir, fmt.Errorf("make staging directory: %w", err)
	}
	return dir, nil
}

// describe adds layer.json to a staged tree.
func (t *trees) describe(staged string, info treeInfo) error {
	data, err := json.Marshal(info)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(staged, "layer.json"), data, 0o600)
}

// publish gives a staged tree its name. Its content is durable already, and the name is pinned; the name is durable when publish
// returns. An image is mounted before it has the name, so that what has one can be used. If there is such a tree, it stays, and
// the staged one is thrown away.
func (t *trees) publish(staged, name string, info treeInfo) error {
	if _, err := mountTree(staged); err != nil {
		return fmt.Errorf("publish layer %s: %w", name, err)
	}
	err := os.Rename(staged, t.path(name))
	if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTEMPTY) {
		return removeTree(staged)
	}
	if err != nil {
		return fmt.Errorf("publish layer %s: %w", name, err)
	}
	if err := syncFile(filepath.Join(t.root, "layers")); err != nil {
		return fmt.Errorf("publish layer %s: %w", name, err)
	}
	t.metrics.layersBytes.Add(float64(info.Bytes))
	return nil
}

// sweep moves every tree that is neither used nor pinned to the trash. The caller makes sure that used grows no further unless by
// trees that are pinned.
func (t *trees) sweep(used map[string]bool) error {
	names, err := readNames(filepath.Join(t.root, "layers"))
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if !used[name] && t.leave(name) {
			info, _ := t.stat(name) // for the metric only
			err := discard(t.root, t.path(name))
			if err == nil {
				t.metrics.layersBytes.Sub(float64(info.Bytes))
			}
			errs = append(errs, err)
			t.left(name)
		}
	}
	return errors.Join(errs...)
}

// leave marks a tree as going, unless someone pinned it.
func (t *trees) leave(name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pins[name] > 0 || t.leaving[name] != nil {
		return false
	}
	t.leaving[name] = make(chan struct{})
	return true
}

func (t *trees) left(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.leaving[name])
	delete(t.leaving, name)
}

// mountAll mounts the images that are not, as after a boot. One that cannot be mounted keeps its snapshots from being used, which
// say so then, and no others.
func (t *trees) mountAll(log *slog.Logger) error {
	names, err := readNames(filepath.Join(t.root, "layers"))
	if err != nil {
		return err
	}
	for _, name := range names {
		if _, err := t.ready(name); err != nil {
			log.Error("layer cannot be used", "error", err)
		}
	}
	return nil
}

// ready makes sure that a tree can be used, and says whether it is an image: one that is not mounted would be an empty directory.
func (t *trees) ready(name string) (image bool, err error) {
	if image, err = mountTree(t.path(name)); err != nil {
		return image, fmt.Errorf("layer %s: %w", name, err)
	}
	return image, nil
}

// count gives the metric its first value.
func (t *trees) count() error {
	sum, err := t.bytes()
	if err != nil {
		return err
	}
	t.metrics.layersBytes.Set(float64(sum))
	return nil
}

// bytes is what all trees take on the disk.
func (t *trees) bytes() (sum int64, err error) {
	names, err := readNames(filepath.Join(t.root, "layers"))
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		info, err := t.stat(name)
		if errors.Is(err, fs.ErrNotExist) { // swept in the meantime
			continue
		}
		if err != nil {
			return 0, err
		}
		sum += info.Bytes
	}
	return sum, nil
}
