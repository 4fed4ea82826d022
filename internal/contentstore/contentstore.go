// Package contentstore keeps the compressed blobs of layers in containerd's content store, for `ctr images export`, for mirrors
// that serve from there, and for pushing. Without it containerd has an image's manifest and config only, as Hearth makes trees of
// layers and stores nothing twice.
//
// A blob is written in the namespace and under the lease of the pull that wants its layer, or of Hold if its layer is fetched before
// the pull, and so is held until the image is there; from then on it is held by the labels that containerd puts on the manifest. It is
// gone when the image is, and the lease of Hold over.
package contentstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hearth-serverless/hearth/registry"
)

// answerTimeout bounds how long containerd may take for one call. An image is not to wait for its blobs.
const answerTimeout = 30 * time.Second

const (
	// criNamespace is where the CRI keeps images.
	criNamespace = "k8s.io"
	// holdTime is how long a lease of Hold lasts: for a fetch, at the longest, and the pull that follows it at once.
	holdTime = 20 * time.Minute
)

// errSlow is why a blob is given up.
var errSlow = errors.New("containerd does not answer")

// Store is containerd's content store. It is safe for concurrent use.
type Store struct {
	conn   *grpc.ClientConn
	store  content.Store
	leases leases.Manager
}

// New makes a Store of the containerd that listens on a socket, which may come later, and come and go.
func New(socket string) (*Store, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", socket, err)
	}
	client, err := containerd.NewWithConn(conn)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &Store{conn: conn, store: contentproxy.NewContentStore(conn), leases: client.LeasesService()}, nil
}

// Close ends the connection.
func (s *Store) Close() error { return s.conn.Close() }

// Hold gives ctx the CRI's namespace and a lease in it, for blobs that are fetched before the pull that wants them. The lease ends by
// itself: nobody tells when the pull has.
func (s *Store) Hold(ctx context.Context) (context.Context, error) {
	ctx = namespaces.WithNamespace(ctx, criNamespace)
	short, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	lease, err := s.leases.Create(short, leases.WithRandomID(), leases.WithExpiration(holdTime))
	if err != nil {
		return nil, fmt.Errorf("lease for blobs: %w", err)
	}
	return leases.WithLease(ctx, lease.ID), nil
}

// Keep opens a place for a layer's blob; ctx is that of the Prepare which asks for the layer. What is written is there after
// commit, and gone after a Close without one. w is nil if the blob is there already.
func (s *Store) Keep(ctx context.Context, ref string, l registry.Layer) (w io.WriteCloser, commit func(context.Context) error, err error) {
	namespace, ok := namespaces.Namespace(ctx)
	if !ok {
		return nil, nil, errors.New("containerd did not say for which namespace")
	}
	lease, ok := leases.FromContext(ctx)
	if !ok {
		return nil, nil, errors.New("containerd has no lease for the pull: garbage collection would take the blob away")
	}
	ctx, cancel := context.WithCancelCause(leases.WithLease(namespaces.WithNamespace(ctx, namespace), lease))
	k := &blob{ctx: ctx, cancel: cancel, layer: l, labels: labelsOf(ref, l)}
	desc := ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size}
	err = k.answer(func() error {
		k.w, err = s.store.Writer(ctx, content.WithRef("hearth-"+l.Digest.String()), content.WithDescriptor(desc))
		return err
	})
	if err == nil {
		err = k.answer(func() error { return k.w.Truncate(0) }) // of a daemon that ended in the middle of it
	}
	switch {
	case errdefs.IsAlreadyExists(err):
		cancel(nil)
		return nil, nil, nil
	case err != nil:
		return nil, nil, errors.Join(fmt.Errorf("store blob %s: %w", l.Digest, err), k.Close())
	}
	return k, k.commit, nil
}

// labelsOf are what containerd's own pull gives a layer's blob: where it can be had, and what is in it.
func labelsOf(ref string, l registry.Layer) map[string]string {
	out := map[string]string{labels.LabelUncompressed: l.DiffID.String()}
	if named, err := reference.ParseDockerRef(ref); err == nil {
		if key := labels.LabelDistributionSource + "." + reference.Domain(named); labels.Validate(key, reference.Path(named)) == nil {
			out[key] = reference.Path(named)
		}
	}
	return out
}

// blob is one blob being written.
type blob struct {
	ctx    context.Context //nolint:containedctx // the stream's, which ends with it
	cancel context.CancelCauseFunc
	layer  registry.Layer
	labels map[string]string
	w      content.Writer
}

// answer runs one call to containerd, and ends the stream if it takes too long.
func (b *blob) answer(call func() error) error {
	late := time.AfterFunc(answerTimeout, func() { b.cancel(errSlow) })
	defer late.Stop()
	err := call()
	if cause := context.Cause(b.ctx); err != nil && cause != nil {
		return cause
	}
	return err
}

// Write implements io.Writer.
func (b *blob) Write(p []byte) (n int, err error) {
	err = b.answer(func() error {
		n, err = b.w.Write(p)
		return err
	})
	return n, err
}

// commit has containerd check the digest and keep the blob.
func (b *blob) commit(context.Context) error {
	err := b.answer(func() error {
		return b.w.Commit(b.ctx, b.layer.Size, b.layer.Digest, content.WithLabels(b.labels))
	})
	if err != nil && !errdefs.IsAlreadyExists(err) { // someone else was faster
		return fmt.Errorf("store blob %s: %w", b.layer.Digest, err)
	}
	return nil
}

// Close ends the stream. containerd forgets what was not committed with the lease that it was under.
func (b *blob) Close() error {
	defer b.cancel(nil)
	if b.w == nil {
		return nil
	}
	return b.w.Close()
}
