package snapshotter_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
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

// forms are run by every test that may see a difference.
var forms = []snapshotter.Form{snapshotter.FormDirectory, snapshotter.FormErofs}

// inForms runs a test for each form that this machine can have.
func inForms(t *testing.T, test func(t *testing.T, form snapshotter.Form)) {
	t.Helper()
	needRoot(t)
	for _, form := range forms {
		t.Run(string(form), func(t *testing.T) { test(t, form) })
	}
}

// as sets the form of a snapshotter.
func as(form snapshotter.Form) func(*snapshotter.Config) {
	return func(c *snapshotter.Config) { c.Form = form }
}

// unmountBelow ends what a snapshotter leaves mounted, as the end of a deployment does.
func unmountBelow(t *testing.T, root string) {
	t.Helper()
	for _, at := range mountsBelow(t, root) {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", at, err)
		}
	}
}

// mountsBelow lists what is mounted below a directory.
func mountsBelow(t *testing.T, root string) (at []string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], root+"/") {
			at = append(at, fields[4])
		}
	}
	slices.Reverse(at)
	return at
}

// fake is a registry and an unpacker in one. A layer is named by a word, and its tree is a file of that name which holds it.
type fake struct {
	mu       sync.Mutex
	images   map[string]*registry.Image
	words    map[digest.Digest]string // by blob digest
	implicit map[string][]string      // by word: directories that only a file in them implies
	extra    map[string][]tar.Header  // by word: more entries
	noImage  map[string]error         // by word: what keeps it from being an image
	unpacker *layer.Unpacker
	fail     map[string]error                     // by word, or "image" for resolving: what goes wrong
	block    map[string]chan struct{}             // by word: unpacking waits for it, or for the end of its context
	opened   map[string]int                       // by word
	siblings map[digest.Digest][]registry.Sibling // by manifest
	search   chan struct{}                        // if not nil: a search for siblings waits for it, or for the end of its context
	searches int
	resolved int
	body     string      // of every blob
	read     chan string // if not nil, receives the word of a layer when its blob is read
	started  chan string // if not nil, receives the word of a layer when its unpacking begins
	running  int
	most     int
}

func newFake() *fake {
	unpacker, err := layer.New(layer.Config{})
	if err != nil {
		panic(err)
	}
	return &fake{
		unpacker: unpacker, extra: map[string][]tar.Header{}, noImage: map[string]error{},
		images: map[string]*registry.Image{}, words: map[digest.Digest]string{}, implicit: map[string][]string{},
		siblings: map[digest.Digest][]registry.Sibling{},
		fail:     map[string]error{}, block: map[string]chan struct{}{}, opened: map[string]int{},
	}
}

// image adds an image made of words; "word~2" is another encoding of the layer word.
func (f *fake) image(ref string, words ...string) *registry.Image {
	img := &registry.Image{Ref: ref, Digest: digest.FromString("manifest " + ref + strings.Join(words, " "))}
	for i, w := range words {
		word, _, _ := strings.Cut(w, "~")
		l := registry.Layer{
			Digest: digest.FromString("blob " + w), DiffID: digest.FromString("tar " + word), Size: int64(100 + i),
			MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", // for which any sibling is better, on however many cores
		}
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
	if img == nil || dgst != "" && img.Digest != dgst {
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
	return io.NopCloser(strings.NewReader(f.body)), nil
}

func (f *fake) Unpack(ctx context.Context, src io.Reader, spec layer.Spec, dir string) (*layer.Result, error) {
	return f.unpack(ctx, src, spec, func(tarball []byte) (*layer.Result, error) {
		return f.unpacker.Unpack(ctx, bytes.NewReader(tarball), specOf(tarball), dir)
	})
}

func (f *fake) UnpackImage(ctx context.Context, src io.Reader, spec layer.Spec, file string) (*layer.Result, error) {
	f.mu.Lock()
	err := f.noImage[f.words[spec.Digest]]
	f.mu.Unlock()
	return f.unpack(ctx, src, spec, func(tarball []byte) (*layer.Result, error) {
		res, uerr := f.unpacker.UnpackImage(ctx, bytes.NewReader(tarball), specOf(tarball), file)
		return res, cmp.Or(err, uerr)
	})
}

func specOf(tarball []byte) layer.Spec {
	return layer.Spec{Digest: digest.FromBytes(tarball), DiffID: digest.FromBytes(tarball)}
}

// tarball is the layer of a word.
func (f *fake) tarball(word string) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	put := func(h *tar.Header, content string) {
		h.Size = int64(len(content))
		h.ModTime = time.Unix(1_700_000_000, 0)
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			panic(err)
		}
	}
	put(&tar.Header{Name: word, Typeflag: tar.TypeReg, Mode: 0o644}, word)
	for _, d := range f.implicit[word] {
		put(&tar.Header{Name: d + "/of-" + word, Typeflag: tar.TypeReg, Mode: 0o644}, "")
	}
	for _, h := range f.extra[word] {
		put(&h, "")
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return buf.Bytes()
}

func (f *fake) unpack(ctx context.Context, src io.Reader, spec layer.Spec, into func([]byte) (*layer.Result, error)) (*layer.Result, error) {
	f.mu.Lock()
	word := f.words[spec.Digest]
	block, fail, tarball := f.block[word], f.fail[word], f.tarball(word)
	f.running++
	f.most = max(f.most, f.running)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.running--
		f.mu.Unlock()
	}()
	if _, _, sibling := strings.Cut(word, "@"); sibling != spec.Indexed {
		return nil, fmt.Errorf("%s: its index is asked for: %v", word, spec.Indexed)
	}
	res, err := into(tarball)
	if err != nil {
		return nil, err
	}
	if f.started != nil {
		f.started <- word
	}
	fetched, err := io.Copy(io.Discard, src)
	if err != nil {
		return nil, err
	}
	if f.read != nil {
		f.read <- word
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
	res.CompressedBytes = fetched
	return res, nil
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
		unmountBelow(t, cfg.Root)
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
