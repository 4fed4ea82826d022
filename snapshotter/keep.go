package snapshotter

import (
	"context"
	"io"
	"log/slog"

	"github.com/hearth-serverless/hearth/registry"
)

// Blobs keeps the compressed blobs of layers, beside the trees that are made of them.
type Blobs interface {
	// Hold gives ctx a namespace and a lease for layers that are fetched before a containerd asks for them.
	Hold(ctx context.Context) (context.Context, error)
	// Keep opens a place for a layer's blob, under the namespace and the lease of the containerd that asked, which ctx carries.
	// What is written is kept by commit, and thrown away by Close without one. w is nil if the blob is kept already.
	Keep(ctx context.Context, ref string, l registry.Layer) (w io.WriteCloser, commit func(context.Context) error, err error)
}

// keptReader copies what is read of a blob to where it is kept. A blob that cannot be kept is no reason not to unpack it.
type keptReader struct {
	io.Reader
	log    *slog.Logger
	layer  registry.Layer
	w      io.WriteCloser // nil: nothing is kept, or nothing any more
	commit func(context.Context) error
}

// keep wraps src, the blob of a job. The caller calls done, if the blob was right, and close.
func (s *jobs) keep(ctx context.Context, j *job, src io.Reader) *keptReader {
	k := &keptReader{Reader: src, log: s.cfg.Logger, layer: j.layer}
	if s.cfg.Blobs == nil {
		return k
	}
	var err error
	if k.w, k.commit, err = s.cfg.Blobs.Keep(ctx, j.ref, j.layer); err != nil {
		k.drop(err)
	}
	return k
}

// Read implements io.Reader.
func (k *keptReader) Read(p []byte) (int, error) {
	n, err := k.Reader.Read(p)
	if k.w != nil && n > 0 {
		if _, err := k.w.Write(p[:n]); err != nil {
			k.drop(err)
		}
	}
	return n, err
}

// drop gives up on keeping.
func (k *keptReader) drop(err error) {
	k.log.Warn("the blob of a layer is not kept", "layer", k.layer.Digest, "error", err)
	k.close()
}

// done keeps what was read, which is the whole blob.
func (k *keptReader) done(ctx context.Context) {
	if k.w == nil {
		return
	}
	if err := k.commit(ctx); err != nil {
		k.drop(err)
	}
}

func (k *keptReader) close() {
	if k.w != nil {
		_ = k.w.Close() // after commit it has nothing to say, and without one it throws away
		k.w = nil
	}
}
