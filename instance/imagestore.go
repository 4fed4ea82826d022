package instance

import (
	"context"
	"fmt"
	"path"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/distribution/reference"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/internal/cripull"
)

// normalize gives a reference the form that containerd keeps images under.
func normalize(ref string) (reference.Named, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", ref, err)
	}
	return named, nil
}

// Image implements images.
func (n *node) Image(ctx context.Context, ref string) (*image, error) {
	ctx = n.in(ctx)
	img, err := n.client.GetImage(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("look up image %s: %w", ref, err)
	}
	spec, err := img.Spec(ctx)
	if err != nil {
		return nil, fmt.Errorf("read config of image %s: %w", ref, err)
	}
	chainID := identity.ChainID(spec.RootFS.DiffIDs).String()
	if _, err := n.client.SnapshotService(n.snapshotter).Stat(ctx, chainID); err != nil {
		return nil, fmt.Errorf("look up snapshot of image %s: %w", ref, err)
	}
	return &image{Ref: ref, Digest: img.Target().Digest, ChainID: chainID, DiffIDs: spec.RootFS.DiffIDs, Config: spec.Config}, nil
}

// Pull implements images.
func (n *node) Pull(ctx context.Context, ref string) error {
	_, err := cripull.Puller{Images: n.image, Credentials: n.credentials, Fetch: n.fetch}.Pull(ctx, ref)
	return err
}

// RemoveImage implements images. containerd answers when its garbage collection has run.
func (n *node) RemoveImage(ctx context.Context, ref string) error {
	_, err := n.image.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err := absent(errgrpc.ToNative(err)); err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	return nil
}

// PrepareSnapshot implements snapshots.
func (n *node) PrepareSnapshot(ctx context.Context, key string, img *image) (rootfs, error) {
	mounts, err := n.client.SnapshotService(n.snapshotter).Prepare(n.leased(ctx), key, img.ChainID)
	if err != nil {
		return rootfs{}, fmt.Errorf("prepare snapshot of %s: %w", img.Ref, err)
	}
	r := rootfs{Key: key, Layers: layersOf(mounts, img.DiffIDs)}
	if r.User, err = n.user(ctx, key, img); err != nil {
		return r, fmt.Errorf("user %q of image %s: %w", img.Config.User, img.Ref, err)
	}
	if r.Tree, r.Upper, err = detach(mounts, n.scratch); err != nil {
		return r, fmt.Errorf("root file system of image %s: %w", img.Ref, err)
	}
	return r, nil
}

// View implements views.
func (n *node) View(ctx context.Context, key string, img *image) (codeTree, error) {
	mounts, err := n.client.SnapshotService(n.snapshotter).View(n.leased(ctx), key, img.ChainID)
	if err != nil {
		return nil, fmt.Errorf("view of %s: %w", img.Ref, err)
	}
	v, err := newView(mounts, n.scratch, layersOf(mounts, img.DiffIDs))
	if err != nil {
		return nil, fmt.Errorf("view of %s: %w", img.Ref, err)
	}
	return v, nil
}

// user looks the image's user up once. Root needs no look at the image: whatever groups it is in, it may do everything anyway.
func (n *node) user(ctx context.Context, snapshot string, img *image) (specs.User, error) {
	name := img.Config.User
	switch name {
	case "", "0", "root", "0:0", "root:root":
		return specs.User{}, nil
	}
	key := userKey{chainID: img.ChainID, user: name}
	n.mu.Lock()
	known, ok := n.users[key]
	n.mu.Unlock()
	if ok {
		return known, nil
	}
	spec := &specs.Spec{Root: &specs.Root{}, Process: &specs.Process{}, Linux: &specs.Linux{}}
	c := &containers.Container{ID: snapshot, Snapshotter: n.snapshotter, SnapshotKey: snapshot}
	if err := oci.ApplyOpts(n.in(ctx), n.client, c, spec, oci.WithUser(name), oci.WithAdditionalGIDs(name)); err != nil {
		return specs.User{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.users) > 1000 { // a node does not have that many images; begin again rather than grow
		clear(n.users)
	}
	n.users[key] = spec.Process.User
	return spec.Process.User, nil
}

// RemoveSnapshot implements snapshots.
func (n *node) RemoveSnapshot(ctx context.Context, key string) error {
	if err := absent(n.client.SnapshotService(n.snapshotter).Remove(n.leased(ctx), key)); err != nil {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	return nil
}

// PreparedSnapshots implements snapshots: they are what the lease holds.
func (n *node) PreparedSnapshots(ctx context.Context) ([]string, error) {
	ctx = n.in(ctx)
	list, err := n.client.LeasesService().ListResources(ctx, leaseOf(n.lease()))
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list prepared snapshots: %w", err)
	}
	var keys []string
	for _, r := range list {
		if r.Type == path.Join("snapshots", n.snapshotter) {
			keys = append(keys, r.ID)
		}
	}
	return keys, nil
}
