package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

func needRoot(t *testing.T) {
	t.Helper()
	if unix.Geteuid() != 0 {
		t.Skip("overlay mounts need root")
	}
}

// fake is a registry and an unpacker in one. A layer is named by a word, and its tree is a file of that name which holds it.
type fake struct {
	mu       sync.Mutex
	images   map[string]*registry.Image
	words    map[digest.Digest]string             // by blob digest
	implicit map[string][]string                  // by word
	fail     map[string]error                     // by word, or "image" for resolving: what goes wrong
	block    map[string]chan struct{}             // by word: unpacking waits for it, or for the end of its context
	opened   map[string]int                       // by word
	siblings map[digest.Digest][]registry.Sibling // by manifest
	search   chan struct{}                        // if not nil: a search for siblings waits for it, or for the end of its context
	searches int
	resolved int
	started  chan string // if not nil, receives the word of a layer when its unpacking begins
	running  int
	most     int
}

func newFake() *fake {
	return &fake{
		images: map[string]*registry.Image{}, words: map[digest.Digest]string{}, implicit: map[string][]string{},
		siblings: map[digest.Digest][]registry.Sibling{},
		fail:     map[string]error{}, block: map[string]chan struct{}{}, opened: map[string]int{},
	}
}

// image adds an image made of words; "word~2" is another encoding of the layer word.
func (f *fake) image(ref string, words ...string) *registry.Image {
	img := &registry.Image{Ref: ref, Digest: digest.FromString("manifest " + ref)}
	for i, w := range words {
		word, _, _ := strings.Cut(w, "~")
		l := registry.Layer{Digest: digest.FromString("blob " + w), DiffID: digest.FromString("tar " + word), Size: int64(100 + i)}
		img.Layers = append(img.Layers, l)
		f.words[l.Digest] = word
	}
	f.images[ref] = img
	return img
}

func (f *fake) Image(_ context.Context, ref string, dgst digest.Digest) (*registry.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resolved++
	if err := f.fail["image"]; err != nil {
		return nil, err
	}
	img := f.images[ref]
	if img == nil || img.Digest != dgst {
		return nil, registry.ErrNotFound
	}
	return img, nil
}

// accelerate attaches siblings of all the image's layers. The word of a sibling is "word@encoding".
func (f *fake) accelerate(img *registry.Image, encoding string) {
	for _, l := range img.Layers {
		word := f.words[l.Digest] + "@" + encoding
		s := registry.Sibling{
			Layer:    registry.Layer{Digest: digest.FromString("blob " + word), DiffID: l.DiffID, Size: l.Size / 2},
			Original: l.Digest, Encoding: encoding, Bytes: l.Size * 3, FrameBytes: layer.FrameBytes,
		}
		f.words[s.Digest] = word
		f.siblings[img.Digest] = append(f.siblings[img.Digest], s)
	}
}

func (f *fake) Siblings(ctx context.Context, _ string, manifest digest.Digest) ([]registry.Sibling, error) {
	f.mu.Lock()
	f.searches++
	found, search, err := f.siblings[manifest], f.search, f.fail["siblings"]
	f.mu.Unlock()
	if search != nil {
		select {
		case <-search:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return found, err
}

func (f *fake) Open(_ context.Context, _ string, l registry.Layer) (io.ReadCloser, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.opened[f.words[l.Digest]]++
	return io.NopCloser(strings.NewReader("")), nil
}

func (f *fake) Unpack(ctx context.Context, src io.Reader, spec layer.Spec, dir string) (*layer.Result, error) {
	f.mu.Lock()
	word := f.words[spec.Digest]
	block, fail, implicit := f.block[word], f.fail[word], f.implicit[word]
	f.running++
	f.most = max(f.most, f.running)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.running--
		f.mu.Unlock()
	}()
	start := time.Now()
	original, _, sibling := strings.Cut(word, "@")
	if sibling != spec.Indexed {
		return nil, fmt.Errorf("%s: its index is asked for: %v", word, spec.Indexed)
	}
	if err := os.WriteFile(filepath.Join(dir, original), []byte(original), 0o644); err != nil {
		return nil, err
	}
	for _, d := range implicit {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if f.started != nil {
		f.started <- word
	}
	if _, err := io.Copy(io.Discard, src); err != nil {
		return nil, err
	}
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if fail != nil {
		return nil, fail
	}
	stage := layer.Stage{Start: start, End: time.Now(), Busy: time.Since(start)}
	return &layer.Result{
		Bytes: 4096, Inodes: int64(1 + len(implicit)), ImplicitDirs: implicit,
		Timings: layer.Timings{Fetch: stage, Decompress: stage, Tar: stage, Write: stage},
	}, nil
}

// count is how often a layer was fetched.
func (f *fake) count(word string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.opened[word]
}

// set changes the fake while it is in use.
func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func corrupt(word string) error {
	return &layer.CorruptError{Layer: digest.FromString("blob " + word), Reason: "digest does not hold"}
}

// pull does what containerd's unpacker does, as far as layers come remotely, and returns the chain's backend names.
type pull struct {
	s    snapshots.Snapshotter
	img  *registry.Image
	bare bool // without the image's labels
}

// prepare asks for layer i on top of the backend's parent. It returns the name that containerd would find.
func (p pull) prepare(ctx context.Context, i int, parent string) (name string, mounts []mount.Mount, err error) {
	labels := p.labels(i)
	key := fmt.Sprintf("ns/%d/extract-%d %s", time.Now().UnixNano(), i, labels[snapshots.LabelSnapshotRef])
	mounts, err = p.s.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
	if !errdefs.IsAlreadyExists(err) {
		return key, mounts, err
	}
	chain := labels[snapshots.LabelSnapshotRef]
	err = p.s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted {
			name = info.Name
		}
		return nil
	}, fmt.Sprintf("labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, chain, parent))
	if err == nil && name == "" {
		err = errors.New("not found after already exists")
	}
	return name, nil, err
}

func (p pull) labels(i int) map[string]string {
	labels := map[string]string{
		snapshots.LabelSnapshotRef:    p.chain(i).String(),
		snapshots.LabelSnapshotDiffID: p.img.Layers[i].DiffID.String(),
	}
	if !p.bare {
		labels[snapshotters.TargetRefLabel] = p.img.Ref
		labels[snapshotters.TargetManifestDigestLabel] = p.img.Digest.String()
		labels[snapshotters.TargetLayerDigestLabel] = p.img.Layers[i].Digest.String()
	}
	return labels
}

func (p pull) chain(i int) digest.Digest {
	var ids []digest.Digest
	for _, l := range p.img.Layers[:i+1] {
		ids = append(ids, l.DiffID)
	}
	return identity.ChainID(ids)
}

// all pulls the whole image, which must come remotely, and returns the top's name.
func (p pull) all(t *testing.T) string {
	t.Helper()
	var parent string
	for i := range p.img.Layers {
		name, mounts, err := p.prepare(t.Context(), i, parent)
		if err != nil || mounts != nil {
			t.Fatalf("layer %d: mounts %v, error %v; want it remotely", i, mounts, err)
		}
		parent = name
	}
	return parent
}

// start opens a snapshotter that is closed with the test, unless it was closed before.
func start(t *testing.T, f *fake, change ...func(*snapshotter.Config)) *snapshotter.Snapshotter {
	t.Helper()
	needRoot(t)
	cfg := snapshotter.Config{Root: t.TempDir(), Registry: f, Layers: f}
	for _, c := range change {
		c(&cfg)
	}
	s, err := snapshotter.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// list gives the names below a directory of the root.
func list(t *testing.T, root, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, dir))
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
