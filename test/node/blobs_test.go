package node_test

import (
	"bytes"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/internal/contentstore"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// lateStore is a content store whose containerd comes after its snapshotter.
type lateStore struct{ *contentstore.Store }

// contents are the digests in the content store.
func (n *pullNode) contents(t *testing.T) (digests []string) {
	t.Helper()
	if err := n.Client.ContentStore().Walk(n.context(t), func(info content.Info) error {
		digests = append(digests, info.Digest.String())
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(digests)
	return digests
}

// expected are the digests of an image: its manifest and config, and its layers if they are to be there.
func expected(t *testing.T, layers bool, imgs ...v1.Image) (digests []string) {
	t.Helper()
	for _, img := range imgs {
		manifest, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		config, err := img.ConfigName()
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, manifest.String(), config.String())
		if layers {
			for _, h := range layerDigests(t, img) {
				digests = append(digests, h.String())
			}
		}
	}
	slices.Sort(digests)
	return slices.Compact(digests)
}

// release ends the leases of what was fetched before its pull, of which the time is long.
func (n *pullNode) release(t *testing.T) {
	t.Helper()
	all, err := n.Client.LeasesService().List(n.context(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 || all[0].Labels["containerd.io/gc.expire"] == "" {
		t.Errorf("leases %+v, want the one of a fetch, which expires", all)
	}
	for _, lease := range all {
		if err := n.Client.LeasesService().Delete(n.context(t), lease); err != nil {
			t.Fatal(err)
		}
	}
}

// collect has containerd collect its garbage.
func (n *pullNode) collect(t *testing.T) {
	t.Helper()
	lease, err := n.Client.LeasesService().Create(n.context(t), leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Client.LeasesService().Delete(n.context(t), lease, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
}

// What is a tree is not a blob as well.
func TestNothingIsStoredTwice(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *pullNode) {
		img := imageOf(t, gzipped, tarball(t, fileEntry("a", "1")), tarball(t, fileEntry("b", "2")))
		if err := n.pull(t, n.registry.push(t, "once:1", img), nil); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(expected(t, false, img), n.contents(t)); diff != "" {
			t.Error(diff)
		}
	})
}

// Blobs that are kept live as long as their image, and are what `ctr images export` wants.
func TestKeepBlobs(t *testing.T) {
	store := &lateStore{}
	bothPaths(t, func(t *testing.T, n *pullNode) {
		var err error
		if store.Store, err = contentstore.New(n.Socket); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = store.Close() }()
		shared := tarball(t, fileEntry("shared", t.Name()))
		a := imageOf(t, gzipped, shared, tarball(t, fileEntry("a", strings.Repeat("a", 3<<20))))
		b := imageOf(t, gzipped, shared, tarball(t, fileEntry("b", "b")))
		refA, refB := n.registry.push(t, "keep/a:1", a), n.registry.push(t, "keep/b:1", b)
		if err := n.snapshot.Fetch(t.Context(), refB); err != nil { // the one before its pull, the other in it
			t.Fatal(err)
		}
		n.collect(t)
		for _, ref := range []string{refA, refB} {
			if err := n.pull(t, ref, nil); err != nil {
				t.Fatal(err)
			}
		}
		n.collect(t)
		if diff := cmp.Diff(expected(t, true, a, b), n.contents(t)); diff != "" {
			t.Fatal(diff)
		}
		for _, img := range []v1.Image{a, b} {
			n.checkLabels(t, img)
		}
		n.checkExport(t, refA, a)
		for _, ref := range []string{refA, refB} {
			if _, err := n.Images.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
				t.Fatal(err)
			}
		}
		n.release(t)
		n.collect(t)
		if left := n.contents(t); len(left) > 0 {
			t.Errorf("%d blobs outlive their images: %v", len(left), left)
		}
		if layers, err := filepath.Glob(filepath.Join(n.root, "layers", "*")); err != nil || len(layers) > 0 {
			t.Errorf("layers left: %v %v", layers, err)
		}
	}, func(_ *registry.Config, c *snapshotter.Config) { c.Blobs = store })
}

func (n *pullNode) checkLabels(t *testing.T, img v1.Image) {
	t.Helper()
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	for i, h := range layerDigests(t, img) {
		info, err := n.Client.ContentStore().Info(n.context(t), digest.Digest(h.String()))
		if err != nil {
			t.Fatal(err)
		}
		source := info.Labels["containerd.io/distribution.source."+n.registry.Listener.Addr().String()]
		if info.Labels["containerd.io/uncompressed"] != config.RootFS.DiffIDs[i].String() || !strings.HasPrefix(source, "keep/") {
			t.Errorf("layer %d has labels %v", i, info.Labels)
		}
	}
}

// checkExport exports an image.
func (n *pullNode) checkExport(t *testing.T, ref string, img v1.Image) {
	t.Helper()
	var tar bytes.Buffer
	if err := archive.Export(n.context(t), n.Client.ContentStore(), &tar, archive.WithImage(n.Client.ImageService(), ref), archive.WithPlatform(platforms.All)); err != nil {
		t.Fatal(err)
	}
	for _, h := range layerDigests(t, img) {
		if !bytes.Contains(tar.Bytes(), []byte("blobs/sha256/"+h.Hex)) {
			t.Errorf("the archive has no layer %s", h)
		}
	}
}
