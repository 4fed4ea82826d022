package snapshotter

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/registry"
)

// jobs are the layers in the making, by diffID, and those whose makers have not let go of them yet. A layer that two images
// share, in whatever encoding, is made once.
type jobs struct {
	cfg      Config
	trees    *trees
	syncer   *syncer
	siblings *siblings
	slots    *slots
	space    *space
	metrics  *metrics
	wg       sync.WaitGroup // the jobs' goroutines

	mu     sync.Mutex // guards live, closed, and the jobs' waiters and taken
	live   map[digest.Digest]*job
	closed bool
}

func newJobs(cfg Config, t *trees, s *syncer, other *siblings, sp *space, m *metrics) *jobs {
	return &jobs{
		cfg: cfg, trees: t, syncer: s, siblings: other, space: sp, metrics: m,
		slots: newSlots(cfg.Parallel), live: map[digest.Digest]*job{},
	}
}

// join waits for a layer together with others, or starts a job for it. The caller owes a leave. ctx lends the job its values, not
// its end: a job ends when the last waiter has left.
func (s *jobs) join(ctx context.Context, ref string, l registry.Layer, found *search) (*job, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	j := s.live[l.DiffID]
	if j == nil || j.failed() {
		jctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
		j = &job{layer: l, ref: ref, search: found, cancel: cancel, done: make(chan struct{}), unpin: func() {}}
		s.live[l.DiffID] = j
		s.wg.Go(func() {
			j.unpin = s.trees.pin(treeName(l.DiffID, ""))
			s.work(jctx, j)
		})
	}
	j.waiters++
	return j, nil
}

func (j *job) isDone() bool {
	select {
	case <-j.done:
		return true
	default:
		return false
	}
}

// failed says whether the job has ended without a tree.
func (j *job) failed() bool { return j.isDone() && j.err != nil }

// leave stops waiting. With the last waiter goes the job: it is cancelled if it runs, and a tree that no one took is wiped.
func (s *jobs) leave(j *job) {
	s.mu.Lock()
	j.waiters--
	last := j.waiters == 0
	if last && s.live[j.layer.DiffID] == j {
		delete(s.live, j.layer.DiffID)
	}
	s.mu.Unlock()
	if !last {
		return
	}
	j.cancel(errUnwaited)
	<-j.done // at once if it has ended, and soon if it was cancelled
	if s.take(j) && j.staged != "" {
		wipe(s.cfg.Logger, j.staged)
	}
	j.unpin()
}

// take makes the caller the owner of a job's staged tree. Whoever comes later joins a new job.
func (s *jobs) take(j *job) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.taken {
		return false
	}
	j.taken = true
	if j.staged != "" && s.live[j.layer.DiffID] == j {
		delete(s.live, j.layer.DiffID)
	}
	return true
}

// close refuses new jobs, ends those that run and waits for them.
func (s *jobs) close() {
	s.mu.Lock()
	s.closed = true
	for _, j := range s.live {
		j.cancel(errClosed)
	}
	s.mu.Unlock()
	s.wg.Wait()
}
