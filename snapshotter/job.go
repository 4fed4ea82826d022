package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

var (
	errStalled   = errors.New("registry sent nothing for too long")
	errDeadline  = errors.New("took longer than a snapshot may take to prepare")
	errUnwaited  = errors.New("no one waits for the layer any more")
	errClosed    = errors.New("snapshotter is closing")
	errTruncated = errors.New("layer is shorter or longer than its manifest says")
)

// job fetches and unpacks one layer. It is alive for as long as someone waits for it; its tree is pinned as long as it is alive.
type job struct {
	layer  registry.Layer
	ref    string  // of the image to fetch it for; any image that has the layer will do
	search *search // for the image's siblings
	cancel context.CancelCauseFunc
	done   chan struct{}
	unpin  func()

	waiters int  // guarded by jobs.mu
	taken   bool // guarded by jobs.mu: the staged tree has found its owner

	// Set before done is closed.
	err    error
	info   treeInfo
	staged string        // the unpacked tree if it has implicit directories; otherwise it has been published already
	result *layer.Result // nil if the tree was there
	queued [2]time.Time  // when waiting for a slot began and ended
	synced [2]time.Time  // when making it durable began and ended

	first   atomic.Bool  // starts are known to read the layer
	fetched atomic.Int64 // bytes of the blob that were read so far
}

// work does the job and says how it went in j.
func (s *jobs) work(ctx context.Context, j *job) {
	defer close(j.done)
	defer j.cancel(nil)
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.PrepareTimeout, errDeadline)
	defer cancel()
	if info, err := s.trees.stat(treeName(j.layer.DiffID, "")); err == nil {
		j.info = info // a job before this one made it
		return
	}
	j.queued[0] = time.Now()
	if j.err = s.slots.acquire(ctx, j.ref, j.layer.Size, &j.first); j.err != nil {
		return
	}
	j.queued[1] = time.Now()
	defer s.slots.release(j.ref)
	release, err := s.space.reserve(ctx, j.layer.Size)
	if err != nil {
		j.err = fmt.Errorf("layer %s: %w", j.layer.Digest, err)
		return
	}
	defer release()
	s.metrics.jobsRunning.Inc()
	defer s.metrics.jobsRunning.Dec()
	staged, err := s.attempt(ctx, j)
	s.metrics.job(j)
	if err == nil && len(j.result.ImplicitDirs) > 0 {
		j.staged = staged
		return
	}
	if err == nil {
		err = s.trees.publish(staged, treeName(j.layer.DiffID, ""), j.info)
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, layer.ErrCorrupt) {
			err = cause
		}
		j.err = err
		if staged != "" {
			wipe(s.cfg.Logger, staged)
		}
	}
}

// produce makes the layer's tree in a staging directory, durable. If it fails the directory is the caller's to remove.
func (s *jobs) produce(ctx context.Context, j *job, from offer) (staged string, err error) {
	if staged, err = s.trees.stage(); err != nil {
		if from.open != nil {
			err = errors.Join(err, from.open.Close())
		}
		return staged, err
	}
	err = s.unpack(ctx, j, from, staged, s.cfg.Form)
	if errors.Is(err, layer.ErrNoImage) {
		s.cfg.Logger.Info("layer is kept as a directory", "layer", j.layer.Digest, "reason", err)
		if err := os.Remove(filepath.Join(staged, imageName)); err != nil {
			return staged, err
		}
		from.open = nil // it has been read
		err = s.unpack(ctx, j, from, staged, FormDirectory)
	}
	if err != nil {
		return staged, err
	}
	if err := s.space.admit(j.info); err != nil {
		return staged, fmt.Errorf("layer %s: %w", j.layer.Digest, err)
	}
	if err := s.trees.describe(staged, j.info); err != nil {
		return staged, fmt.Errorf("describe layer %s: %w", j.layer.Digest, err)
	}
	j.synced[0] = time.Now()
	err = s.syncer.tree(staged)
	j.synced[1] = time.Now()
	return staged, err
}

// unpack fetches a form of the layer into a staging directory.
func (s *jobs) unpack(ctx context.Context, j *job, from offer, staged string, form Form) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	src := from.open
	if src == nil {
		blob, err := s.cfg.Registry.Open(ctx, j.ref, from.layer)
		if err != nil {
			return fmt.Errorf("fetch layer %s: %w", from.layer.Digest, err)
		}
		src = &openBlob{blob, func(error) {}} // it ends with ctx
	}
	defer context.AfterFunc(ctx, func() { src.cancel(context.Cause(ctx)) })()
	metered := &meteredReader{ReadCloser: &linkReader{src, s.siblings.measure.link(j.ref)}, sum: &j.fetched, space: s.space}
	watched := newWatchedReader(metered, s.cfg.StallTimeout, func() { cancel(errStalled) })
	defer watched.Close()
	kept := s.keep(ctx, j, watched)
	defer kept.close()
	spec := layer.Spec{Digest: from.layer.Digest, DiffID: j.layer.DiffID, Size: from.layer.Size, MediaType: from.layer.MediaType, Indexed: from.sibling}
	var res *layer.Result
	if form == FormErofs {
		res, err = s.cfg.Layers.UnpackImage(ctx, kept, spec, filepath.Join(staged, imageName))
	} else {
		res, err = s.cfg.Layers.Unpack(ctx, kept, spec, filepath.Join(staged, "fs"))
	}
	_ = watched.Close() // everything read is verified by now
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, layer.ErrCorrupt) {
		return cause
	}
	if err != nil {
		return sizeFault(from.layer, err)
	}
	kept.done(ctx)
	j.result, j.info = res, treeInfo{Bytes: res.Bytes, Inodes: res.Inodes + 1}
	if form == FormErofs {
		j.info.Inodes = 2 // of the disk: the image, and what it is mounted on
	}
	return nil
}

// sizeFault turns a blob of the wrong length into an error that is not fallen back from. A connection that breaks is something
// else: the registry's client resumes, and in the end tells why it could not.
func sizeFault(l registry.Layer, err error) error {
	if errors.Is(err, layer.ErrCorrupt) || !errors.Is(err, registry.ErrSize) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	return fmt.Errorf("%w: %s of %d bytes: %w", errTruncated, l.Digest, l.Size, err)
}

// watchedReader calls stalled when a source has brought nothing for some time. A source that no one reads does not stall.
type watchedReader struct {
	src   io.ReadCloser
	limit time.Duration
	timer *time.Timer
	close func() error
}

func newWatchedReader(src io.ReadCloser, limit time.Duration, stalled func()) *watchedReader {
	timer := time.AfterFunc(limit, stalled)
	timer.Stop()
	return &watchedReader{src: src, limit: limit, timer: timer, close: sync.OnceValue(src.Close)}
}

// Read implements io.Reader.
func (w *watchedReader) Read(p []byte) (int, error) {
	w.timer.Reset(w.limit)
	n, err := w.src.Read(p)
	w.timer.Stop()
	return n, err
}

// Close stops the watch and closes the source.
func (w *watchedReader) Close() error {
	w.timer.Stop()
	return w.close()
}

// wipe removes what a job leaves behind. What cannot be removed goes with the next start.
func wipe(log *slog.Logger, dir string) {
	if err := removeTree(dir); err != nil {
		log.Warn("staging directory is left behind until the next start", "path", dir, "error", err)
	}
}
