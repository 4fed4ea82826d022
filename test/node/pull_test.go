package node_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// pullNode is a containerd with our snapshotter and a registry.
type pullNode struct {
	*containerdNode
	registry *testRegistry
	snapshot *snapshotter.Snapshotter
	root     string // of the snapshotter
}

func newPullNode(t *testing.T, localPull bool, change ...func(*registry.Config, *snapshotter.Config)) *pullNode {
	t.Helper()
	toolsDir(t)
	n := &pullNode{registry: startRegistry(t), root: t.TempDir()}
	hosts := hostsDir(t, n.registry.Server)
	logger := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	config, snapshots := registry.Config{HostsDir: hosts}, snapshotter.Config{Root: n.root, Logger: logger}
	for _, c := range change {
		c(&config, &snapshots)
	}
	client, err := registry.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	unpacker, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	snapshots.Registry, snapshots.Layers = client, unpacker
	n.snapshot, err = snapshotter.New(snapshots)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.snapshot.Close(); err != nil {
			t.Error(err)
		}
		unmountBelow(t, n.root)
	})
	n.containerdNode = startContainerd(t, containerdOptions{Snapshotter: n.snapshot, LocalPull: localPull, HostsDir: hosts})
	return n
}

// bothPaths runs a test with CRI's two ways to pull.
func bothPaths(t *testing.T, test func(t *testing.T, n *pullNode), change ...func(*registry.Config, *snapshotter.Config)) {
	for name, local := range map[string]bool{"transfer": false, "local": true} {
		t.Run(name, func(t *testing.T) { test(t, newPullNode(t, local, change...)) })
	}
}

func (n *pullNode) pull(t *testing.T, ref string, auth *cri.AuthConfig) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: auth})
	return err
}

// blobsPresent counts the image's layer blobs in the content store.
func (n *pullNode) blobsPresent(t *testing.T, img v1.Image) (present int) {
	t.Helper()
	for _, h := range layerDigests(t, img) {
		if _, err := n.Client.ContentStore().Info(n.context(t), digest.Digest(h.String())); err == nil {
			present++
		} else if !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
	}
	return present
}

// chains are the chain IDs of an image, lowest first.
func chains(t *testing.T, img v1.Image) []string {
	t.Helper()
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]digest.Digest, len(config.RootFS.DiffIDs))
	for i, h := range config.RootFS.DiffIDs {
		ids[i] = digest.Digest(h.String())
	}
	names := make([]string, len(ids))
	for i, c := range identity.ChainIDs(ids) {
		names[i] = c.String()
	}
	return names
}

// trees mounts a view of each of the image's chains and describes it.
func (n *pullNode) trees(t *testing.T, ctx context.Context, name string, img v1.Image) (all []map[string]string) {
	t.Helper()
	ctx, done, err := n.Client.WithLease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = done(ctx) }()
	sn := n.Client.SnapshotService(name)
	for i, chain := range chains(t, img) {
		key := fmt.Sprintf("view-%d-%d", time.Now().UnixNano(), i)
		mounts, err := sn.View(ctx, key, chain)
		if err != nil {
			t.Fatalf("view of layer %d: %v", i, err)
		}
		if err := mount.WithTempMount(ctx, mounts, func(dir string) error {
			all = append(all, describeTree(t, dir))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := sn.Remove(ctx, key); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// reference pulls an image into containerd's own overlayfs, in another namespace, and describes its trees.
func (n *pullNode) reference(t *testing.T, ref string, img v1.Image) []map[string]string {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "reference")
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))})
	if _, err := n.Client.Pull(ctx, ref, containerd.WithPullUnpack, containerd.WithPullSnapshotter("overlayfs"), containerd.WithResolver(resolver)); err != nil {
		t.Fatal(err)
	}
	return n.trees(t, ctx, "overlayfs", img)
}

// describeTree is everything that a container can see of a tree but for the times of directories that a layer leaves implicit (the root
// too): containerd makes them when it unpacks.
func describeTree(t *testing.T, root string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	if err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("mode %o owner %d:%d rdev %x", st.Mode, st.Uid, st.Gid, st.Rdev)
		if top, _, _ := strings.Cut(rel, "/"); st.Mode&unix.S_IFMT != unix.S_IFDIR || rel != "." && !slices.Contains([]string{"brand", "long", "srv"}, top) {
			s += fmt.Sprintf(" mtime %d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" nlink %d size %d %s", st.Nlink, st.Size, digest.FromBytes(data))
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			s += " -> " + to
		}
		tree[rel] = s + xattrs(t, path)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return tree
}

func xattrs(t *testing.T, path string) (s string) {
	t.Helper()
	buf := make([]byte, 4096)
	size, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Split(strings.TrimRight(string(buf[:size]), "\x00"), "\x00")
	slices.Sort(names)
	for _, name := range names {
		value := make([]byte, 4096)
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") { // a bind of one layer shows them, and they differ for the kernel's own
			continue
		}
		size, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatal(err)
		}
		s += fmt.Sprintf(" %s=%x", name, value[:size])
	}
	return s
}

func TestPullByCRI(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *pullNode) {
		tars := tortureLayers(t)
		gz := imageOf(t, gzipped, tars...)
		want := n.reference(t, n.registry.push(t, "torture:gzip-reference", gz), gz)
		if len(want[0]) < 40 {
			t.Fatalf("the reference has only %d files", len(want[0]))
		}
		for _, e := range []encoding{gzipped, zstded, lz4ed, plain} {
			// Another first layer for each encoding, or all of them would be there already.
			own := append([][]byte{tarball(t, fileEntry("encoding", string(e)))}, tars...)
			img, ref := imageOf(t, e, own...), ""
			ref = n.registry.push(t, "torture:"+string(e), img)
			if err := n.pull(t, ref, nil); err != nil {
				t.Fatalf("%s: %v", e, err)
			}
			if present := n.blobsPresent(t, img); present != 0 {
				t.Errorf("%s: %d layer blobs are in the content store, want none", e, present)
			}
			got := n.trees(t, n.context(t), "hearth", img)[1:]
			for i := range got {
				delete(got[i], "encoding")
				if diff := cmp.Diff(want[i], got[i]); diff != "" {
					t.Errorf("%s, layer %d: -containerd +hearth\n%s", e, i, diff)
				}
			}
			if phases, ok := n.snapshot.Trace(ref); !ok || len(phases) < 2 {
				t.Errorf("%s: trace %v %v", e, phases, ok)
			}
		}
		n.checkContainer(t, n.registry.push(t, "torture:gzip", imageOf(t, gzipped, append([][]byte{tarball(t, fileEntry("encoding", "gzip"))}, tars...)...)))
	})
}

// checkContainer makes a container of a pulled image, as far as its file system.
func (n *pullNode) checkContainer(t *testing.T, ref string) {
	t.Helper()
	image, err := n.Client.GetImage(n.context(t), ref)
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.Client.NewContainer(n.context(t), "box", containerd.WithSnapshotter("hearth"), containerd.WithNewSnapshot("box", image), containerd.WithNewSpec(oci.WithImageConfig(image)))
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := n.Client.SnapshotService("hearth").Mounts(n.context(t), "box")
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(n.context(t), mounts, func(dir string) error {
		if err := os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("mine"), 0o600); err != nil {
			return err
		}
		return os.Remove(filepath.Join(dir, "usr/bin/su"))
	}); err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(n.context(t), containerd.WithSnapshotCleanup); err != nil {
		t.Fatal(err)
	}
}

// A registry that refuses us, and only us, costs speed and nothing else.
func TestPullFallsBack(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *pullNode) {
		refuse := func(w http.ResponseWriter, r *http.Request) bool {
			ours := r.UserAgent() == "hearth"
			if ours {
				w.WriteHeader(http.StatusInternalServerError)
			}
			return ours
		}
		n.registry.fault.Store(&refuse)
		img := imageOf(t, gzipped, tortureLayers(t)...)
		ref := n.registry.push(t, "fallback:1", img)
		if err := n.pull(t, ref, nil); err != nil {
			t.Fatal(err)
		}
		if n.blobsPresent(t, img) == 0 {
			t.Error("no blobs: it did not fall back")
		}
		if diff := cmp.Diff(n.reference(t, ref, img), n.trees(t, n.context(t), "hearth", img)); diff != "" {
			t.Errorf("-containerd +hearth\n%s", diff)
		}
	})
}

func TestPullRefusesCorruptBlob(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *pullNode) {
		img := imageOf(t, gzipped, tarball(t, fileEntry("good", "g")), tarball(t, fileEntry("bad", strings.Repeat("b", 1000))))
		ref := n.registry.push(t, "corrupt:1", img)
		bad := layerDigests(t, img)[1].String()
		corrupt := func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+bad) {
				return false
			}
			blob := gzipped.encode(t, tarball(t, fileEntry("bad", strings.Repeat("B", 1000)))) // of the same length
			_, _ = w.Write(blob)
			return true
		}
		n.registry.fault.Store(&corrupt)
		err := n.pull(t, ref, nil)
		if err == nil || !strings.Contains(err.Error(), bad) {
			t.Fatalf("error %v, want one that names %s", err, bad)
		}
		if _, err := n.Client.SnapshotService("hearth").Stat(n.context(t), chains(t, img)[1]); !errdefs.IsNotFound(err) {
			t.Errorf("the corrupt layer's snapshot: %v", err)
		}
		if staged, err := os.ReadDir(filepath.Join(n.root, "staging")); err != nil || len(staged) > 0 {
			t.Errorf("staging has %v, %v", staged, err)
		}
		n.registry.fault.Store(nil)
		if err := n.pull(t, ref, nil); err != nil {
			t.Errorf("after the registry was repaired: %v", err)
		}
	})
}

func TestPullPrivate(t *testing.T) {
	config := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(config, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	bothPaths(t, func(t *testing.T, n *pullNode) {
		img := imageOf(t, gzipped, tarball(t, fileEntry("secret", "s"+t.Name())))
		ref := n.registry.push(t, "private:1", img)
		guard := func(w http.ResponseWriter, r *http.Request) bool {
			user, password, ok := r.BasicAuth()
			if ok && user == "me" && password == "pass" {
				return false
			}
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		n.registry.fault.Store(&guard)
		auth := base64.StdEncoding.EncodeToString([]byte("me:pass"))
		data := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, n.registry.Listener.Addr().String(), auth)
		if err := os.WriteFile(config, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := n.pull(t, ref, &cri.AuthConfig{Username: "me", Password: "pass"}); err != nil {
			t.Fatal(err)
		}
		if present := n.blobsPresent(t, img); present != 0 {
			t.Errorf("%d blobs in the content store: it fell back", present)
		}
	}, func(c *registry.Config, _ *snapshotter.Config) { c.DockerConfig = config })
}

// CRI unpacks an image whose snapshots are missing when it creates a container, without a fetcher: the blobs are nowhere, so it is
// up to us, whether the labels name the image or not.
func TestUnpackAtContainerCreate(t *testing.T) {
	for name, annotated := range map[string]bool{"annotated": true, "bare": false} {
		t.Run(name, func(t *testing.T) {
			n := newPullNode(t, annotated)
			img := imageOf(t, gzipped, tortureLayers(t)...)
			ref := n.registry.push(t, "create:1", img)
			if err := n.pull(t, ref, nil); err != nil {
				t.Fatal(err)
			}
			want := n.trees(t, n.context(t), "hearth", img)
			n.removeSnapshots(t, img)
			n.unpackAgain(t, ref, annotated)
			if diff := cmp.Diff(want, n.trees(t, n.context(t), "hearth", img)); diff != "" {
				t.Error(diff)
			}
			n.checkContainer(t, ref)
		})
	}
}

// removeSnapshots removes the image's chains, and has containerd collect the garbage.
func (n *pullNode) removeSnapshots(t *testing.T, img v1.Image) {
	t.Helper()
	names := chains(t, img)
	slices.Reverse(names)
	for _, name := range names {
		// Once the top is gone, a collection that was on its way may take the rest.
		if err := n.Client.SnapshotService("hearth").Remove(n.context(t), name); err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
	}
	lease, err := n.Client.LeasesService().Create(n.context(t), leases.WithID("collect"))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Client.LeasesService().Delete(n.context(t), lease, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"layers", "snapshots", "trash"} {
		if left, err := os.ReadDir(filepath.Join(n.root, dir)); err != nil || len(left) > 0 {
			t.Errorf("%s after garbage collection: %v %v", dir, left, err)
		}
	}
}

// unpackAgain is what CRI does at container creation (internal/cri/opts.unpackImage).
func (n *pullNode) unpackAgain(t *testing.T, ref string, annotated bool) {
	t.Helper()
	ctx, done, err := n.Client.WithLease(n.context(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = done(ctx) }()
	image, err := n.Client.GetImage(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	u, err := unpack.NewUnpacker(ctx, image.ContentStore(), unpack.WithUnpackPlatform(unpack.Platform{
		Platform: platforms.Default(), SnapshotterKey: "hearth", Snapshotter: n.Client.SnapshotService("hearth"), Applier: n.Client.DiffService(),
	}), unpack.WithUnpackLimiter(semaphore.NewWeighted(3)))
	if err != nil {
		t.Fatal(err)
	}
	var h images.Handler = images.LimitManifests(images.ChildrenHandler(image.ContentStore()), platforms.Default(), 1)
	if annotated {
		h = snapshotters.AppendInfoHandlerWrapper(ref)(h)
	}
	if err := images.Dispatch(ctx, u.Unpack(h), nil, image.Target()); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Wait(); err != nil {
		t.Fatal(err)
	}
}

// containerd and the snapshotter agree after containerd was killed in the middle of a pull.
func TestPullAfterKill(t *testing.T) {
	n := newPullNode(t, false)
	img := imageOf(t, gzipped, tortureLayers(t)...)
	ref := n.registry.push(t, "killed:1", img)
	begun, killed := make(chan struct{}, 64), make(chan struct{})
	held := func(_ http.ResponseWriter, r *http.Request) bool {
		if r.UserAgent() == "hearth" && strings.Contains(r.URL.Path, "/blobs/") {
			begun <- struct{}{}
			<-killed
		}
		return false
	}
	n.registry.fault.Store(&held)
	pulled := make(chan error, 1)
	go func() { pulled <- n.pull(t, ref, nil) }()
	<-begun
	n.kill(t)
	close(killed)
	if err := <-pulled; err == nil {
		t.Error("the pull survived its containerd")
	}
	n.start(t)
	n.registry.fault.Store(nil)
	if err := n.pull(t, ref, nil); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(n.reference(t, ref, img), n.trees(t, n.context(t), "hearth", img)); diff != "" {
		t.Errorf("-containerd +hearth\n%s", diff)
	}
}
