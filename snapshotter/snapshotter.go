package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Snapshotter implements containerd's snapshots.Snapshotter and snapshots.Cleaner. It is safe for concurrent use.
type Snapshotter struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	ms       *storage.MetaStore
	trees    *trees
	syncer   *syncer
	space    *space
	siblings *siblings
	jobs     *jobs
	sessions *sessions
	sources  *sources
	traces   *traces
	options  []string // of overlay mounts
	lock     *os.File
	deleting sync.WaitGroup // the deletion of what the last run left
	close    func() error
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens the snapshotter below cfg.Root and throws away what an earlier run left half-made. It fails if another process uses
// the root, or if its file system cannot hold overlays.
func New(cfg Config) (*Snapshotter, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("register snapshotter metrics: %w", err)
	}
	if err := prepareRoot(cfg.Root); err != nil {
		return nil, fmt.Errorf("snapshotter root: %w", err)
	}
	s := &Snapshotter{cfg: cfg, log: cfg.Logger, metrics: m, trees: newTrees(cfg.Root, m)}
	s.close = sync.OnceValue(s.shut)
	if err := s.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open snapshotter %s: %w", cfg.Root, err), s.release())
	}
	s.space = &space{root: cfg.Root, minFree: cfg.MinFreePercent, maxBytes: cfg.MaxBytes, trees: s.trees, sweep: s.Cleanup}
	s.siblings = newSiblings(s.cfg, m)
	s.jobs = newJobs(s.cfg, s.trees, s.syncer, s.siblings, s.space, m)
	s.traces = &traces{by: map[string]*trace{}}
	s.sources = &sources{by: map[digest.Digest]source{}}
	s.sessions = &sessions{
		cfg: cfg, jobs: s.jobs, siblings: s.siblings, trees: s.trees, traces: s.traces, sources: s.sources,
		beside: newBeside(cfg.Profiles), idle: s.sweepQuietly, live: map[sessionKey]*session{},
	}
	s.deleting.Go(func() {
		if err := emptyTrash(cfg.Root); err != nil {
			s.log.Warn("delete what the last run left", "error", err)
		}
	})
	return s, nil
}

// open takes hold of the root and brings it to a state that metadata agrees with.
func (s *Snapshotter) open() (err error) {
	root := s.cfg.Root
	if s.lock, err = lockRoot(root); err != nil {
		return err
	}
	if s.syncer, err = newSyncer(root); err != nil {
		return err
	}
	if s.options, err = overlayOptions(); err != nil {
		return err
	}
	if s.ms, err = storage.NewMetaStore(filepath.Join(root, "metadata.db")); err != nil {
		return err
	}
	staged, err := readNames(filepath.Join(root, "staging"))
	if err != nil {
		return err
	}
	for _, name := range staged {
		if err := discard(root, filepath.Join(root, "staging", name)); err != nil {
			return err
		}
	}
	if s.cfg.Form, err = chooseForm(s.cfg.Form, root, s.log); err != nil {
		return err
	}
	if err := s.sweep(context.Background()); err != nil {
		return err
	}
	if err := s.trees.mountAll(s.log); err != nil {
		return err
	}
	return s.trees.count()
}

// Close refuses new work, cancels the jobs that run, waits for them and closes the metadata. It can be called again. The images of
// layers stay mounted: containers are being made of them, and the next Snapshotter on this root takes them over.
func (s *Snapshotter) Close() error { return s.close() }

func (s *Snapshotter) shut() error {
	s.jobs.close()
	s.sessions.shut()
	s.sessions.beside.close()
	s.siblings.close()
	s.deleting.Wait()
	return s.release()
}

func (s *Snapshotter) release() error {
	var errs []error
	if s.ms != nil {
		errs = append(errs, s.ms.Close())
	}
	if s.syncer != nil {
		errs = append(errs, s.syncer.close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

// Prepare makes a writable snapshot, or brings a layer: then it answers errdefs.ErrAlreadyExists, and a committed snapshot with
// the label containerd.io/snapshot.ref and that parent is there. A layer that is corrupt is an error that names it.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	start := time.Now()
	mounts, result, err := s.prepare(ctx, key, parent, opts)
	err = s.space.explain(err)
	s.metrics.prepares.WithLabelValues(result).Inc()
	s.metrics.prepareSeconds.WithLabelValues(result).Observe(time.Since(start).Seconds())
	return mounts, err
}

func (s *Snapshotter) prepare(ctx context.Context, key, parent string, opts []snapshots.Opt) (_ []mount.Mount, result string, _ error) {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return nil, resultError, err
		}
	}
	result = resultPlain
	t, err := parseTarget(base.Labels)
	if err != nil {
		err = &fallback{"labels", err}
	}
	if t != nil {
		err = s.prepareRemote(ctx, request{target: t, key: key, parent: parent, opts: opts})
		if err == nil {
			s.log.Debug("layer prepared", "chain", t.chain, "image", t.image)
			return nil, resultRemote, fmt.Errorf("snapshot %s: %w", t.chain, errdefs.ErrAlreadyExists)
		}
	}
	var fb *fallback
	switch {
	case err == nil || errors.Is(err, errPlain):
	case ctx.Err() != nil:
		return nil, resultError, fmt.Errorf("prepare %s: %w", key, context.Cause(ctx))
	case errors.As(err, &fb):
		result = resultFallback
		s.metrics.fallbacks.WithLabelValues(fb.reason).Inc()
		s.log.Warn("containerd will pull a layer itself", "key", key, "reason", fb.reason, "error", fb.err)
	default:
		err = s.space.explain(err)
		s.log.Error("layer refused", "key", key, "error", err)
		return nil, resultError, fmt.Errorf("prepare %s: %w", key, err)
	}
	mounts, err := s.create(ctx, snapshots.KindActive, key, parent, opts)
	if err != nil {
		result = resultError
	}
	return mounts, result, err
}

// View makes a read-only snapshot.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

// Commit makes a writable snapshot a layer for others. Its parent is the one it was prepared with.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return err
		}
	}
	var id string
	if err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		var info snapshots.Info
		var err error
		id, info, _, err = storage.GetInfo(ctx, key)
		if err == nil && base.Parent != "" && base.Parent != info.Parent {
			err = fmt.Errorf("snapshot %s: no rebase at commit: %w", key, errdefs.ErrInvalidArgument)
		}
		return err
	}); err != nil {
		return err
	}
	usage, err := fs.DiskUsage(ctx, s.upperPath(id)) // before the transaction, which everyone waits for
	if err != nil {
		return fmt.Errorf("usage of snapshot %s: %w", key, err)
	}
	return s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		if _, err := storage.CommitActive(ctx, key, name, snapshots.Usage(usage), opts...); err != nil {
			return fmt.Errorf("commit snapshot %s: %w", key, err)
		}
		return nil
	})
}

// Stat describes a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes a snapshot's labels.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Walk calls fn for every snapshot that matches one of the filters.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, fn, filters...)
	})
}

// Usage is what a snapshot takes on the disk, without its parents. A writable one is measured now. A tree that several snapshots
// share counts for each.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var id string
	var info snapshots.Info
	if err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	}); err != nil || info.Kind != snapshots.KindActive {
		return usage, err
	}
	du, err := fs.DiskUsage(ctx, s.upperPath(id))
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of snapshot %s: %w", key, err)
	}
	return snapshots.Usage(du), nil
}

func (s *Snapshotter) snapshotPath(id string) string {
	return filepath.Join(s.cfg.Root, "snapshots", id)
}
func (s *Snapshotter) upperPath(id string) string { return filepath.Join(s.snapshotPath(id), "fs") }
func (s *Snapshotter) workPath(id string) string  { return filepath.Join(s.snapshotPath(id), "work") }

func sortPhases(phases []Phase) {
	slices.SortStableFunc(phases, func(a, b Phase) int { return a.Start.Compare(b.Start) })
}
