package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/hearth-serverless/hearth/registry"
)

// failureHold is how long an image that could not be resolved is not asked for again, so that a pull which falls back does not
// pay for every layer.
const failureHold = 10 * time.Second

// session is an image being pulled. It waits for all of the image's layers from the first Prepare until the last layer was
// prepared, or until containerd has asked for none for a while.
type session struct {
	key    sessionKey
	trace  *trace
	search *search            // for siblings; of the image itself once it is resolved
	cancel context.CancelFunc // of resolving

	resolved chan struct{}
	// Set before resolved is closed.
	image    *registry.Image
	err      error
	failedAt time.Time

	// Guarded by sessions.mu.
	preparing int                    // Prepares under way
	jobs      map[digest.Digest]*job // by diffID; each is owed a leave
	unpins    []func()
	complete  bool        // the last layer was prepared, or need not be
	whole     bool        // there was nothing to do
	refused   bool        // a layer was refused, and with it the image
	ended     bool        // what it held was let go
	told      bool        // that all of it is unpacked
	idle      *time.Timer // runs while preparing is 0
}

type sessionKey struct {
	ref      string
	manifest digest.Digest // what containerd resolved it to; empty for one that Fetch began
}

// sessions are the images being pulled.
type sessions struct {
	cfg      Config
	jobs     *jobs
	siblings *siblings
	trees    *trees
	traces   *traces
	sources  *sources
	beside   *beside
	idle     func(context.Context) // called after a session ended with layers that no one had asked for
	wg       sync.WaitGroup

	mu     sync.Mutex // guards live, closed, and what the sessions say of it
	live   map[sessionKey]*session
	closed bool
}

// enter joins the session of an image, if there is one. The caller owes a close.
func (s *sessions) enter(key sessionKey) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.join(s.live[key])
}

// open enters the session of an image, or begins it. The caller owes a close.
func (s *sessions) open(ctx context.Context, key sessionKey) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if se := s.join(s.live[key]); se != nil {
		return se, nil
	}
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.ResolveTimeout)
	se := &session{
		key: key, cancel: cancel, trace: s.traces.begin(key), preparing: 1,
		resolved: make(chan struct{}), jobs: map[digest.Digest]*job{},
	}
	if key.manifest != "" {
		se.search = s.siblings.search(ctx, key.ref, key.manifest) // takes as long as resolving does
	}
	s.live[key] = se
	s.wg.Go(func() { s.resolve(rctx, se) })
	return se, nil
}

// enterFetched joins the session in which Fetch brings the image of a target, if there is one that has its layer.
func (s *sessions) enterFetched(t *target) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	se := s.live[sessionKey{ref: t.image}]
	if se == nil || !se.isResolved() || se.err != nil {
		return nil
	}
	if _, err := se.find(t); err != nil {
		return nil
	}
	return s.join(se)
}

// held are the jobs of a session.
func (s *sessions) held(se *session) []*job {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(se.jobs))
}

// join counts the caller in, unless the session's failure is too old to go by. s.mu is held.
func (s *sessions) join(se *session) *session {
	if se == nil || se.failed() && time.Since(se.failedAt) > failureHold {
		return nil
	}
	if se.idle != nil && se.idle.Stop() {
		s.wg.Done()
	}
	se.idle = nil
	se.preparing++
	return se
}

// resolve reads the image's manifest and starts jobs for all layers that are not on the disk.
func (s *sessions) resolve(ctx context.Context, se *session) {
	defer close(se.resolved)
	defer se.cancel()
	if se.err = s.start(ctx, se); se.err != nil {
		se.failedAt = time.Now()
	}
}

func (s *sessions) start(ctx context.Context, se *session) (err error) {
	begun := time.Now()
	se.image, err = s.cfg.Registry.Image(ctx, se.key.ref, se.key.manifest)
	se.trace.add(phaseResolve, begun, time.Now())
	s.jobs.metrics.phase(phaseResolve, time.Since(begun))
	if err != nil {
		return err
	}
	if se.image.Digest != se.key.manifest { // that was an index
		se.search = s.siblings.search(ctx, se.key.ref, se.image.Digest)
	}
	s.sources.add(sessionKey{ref: se.key.ref, manifest: cmp.Or(se.key.manifest, se.image.Digest)}, se.image)
	se.trace.describe(se.image)
	diffIDs := make([]digest.Digest, len(se.image.Layers))
	for i, l := range se.image.Layers {
		diffIDs[i] = l.DiffID
	}
	for i, chain := range identity.ChainIDs(diffIDs) { // in place
		l := se.image.Layers[i]
		if s.hold(se, l, chain) {
			se.trace.found(l.DiffID)
			continue
		}
		if _, err := s.job(ctx, se, l); err != nil {
			return err
		}
	}
	s.ask(ctx, se)
	return nil
}

// hold pins a layer's trees for the session and says whether one of them is there.
func (s *sessions) hold(se *session, l registry.Layer, chain digest.Digest) (found bool) {
	for _, name := range []string{treeName(l.DiffID, ""), treeName(l.DiffID, chain)} {
		unpin := s.trees.pin(name)
		s.mu.Lock()
		if se.ended {
			s.mu.Unlock()
			unpin()
			return true
		}
		se.unpins = append(se.unpins, unpin)
		s.mu.Unlock()
		if _, err := s.trees.stat(name); err == nil {
			found = true
		}
	}
	return found
}

// job is the session's job for a layer; there is a new one if there is none or it was dropped.
func (s *sessions) job(ctx context.Context, se *session, l registry.Layer) (*job, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j := se.jobs[l.DiffID]; j != nil {
		return j, nil
	}
	if se.ended {
		return nil, errClosed
	}
	j, err := s.jobs.join(ctx, se.key.ref, l, se.search)
	if err != nil {
		return nil, err
	}
	se.jobs[l.DiffID] = j
	se.trace.joined(j)
	return j, nil
}

// drop makes the session forget a job that failed or whose tree went to another chain.
func (s *sessions) drop(se *session, j *job) {
	s.mu.Lock()
	owed := se.jobs[j.layer.DiffID] == j
	if owed {
		delete(se.jobs, j.layer.DiffID)
	}
	s.mu.Unlock()
	if owed {
		s.jobs.leave(j)
	}
}

// prepared notes that a layer was answered for. With the image's last one the session has done its duty.
func (s *sessions) prepared(ctx context.Context, se *session, diffID digest.Digest) {
	if !se.isResolved() || se.err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	layers := se.image.Layers
	se.complete = se.complete || layers[len(layers)-1].DiffID == diffID
	if se.complete && !se.told {
		se.told = true
		s.unpacked(ctx, se)
	}
	if j := se.jobs[diffID]; j != nil && j.isDone() {
		se.trace.addJob(j)
	}
}

// fulfil notes that all of the image's snapshots were there already.
func (s *sessions) fulfil(se *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	se.complete, se.whole = true, true
}

// refuse notes that the image cannot be had: who pulls it next begins afresh, and what else was fetched for it goes.
func (s *sessions) refuse(se *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	se.refused = true
}

// close leaves a session. When no one is left it ends after a while; at once if it is complete or was refused.
func (s *sessions) close(ctx context.Context, se *session) {
	s.mu.Lock()
	if se.preparing--; se.preparing > 0 {
		s.mu.Unlock()
		return
	}
	if se.complete || se.refused || s.closed {
		release, sweep := s.end(se), se.refused && !s.closed
		if sweep {
			s.wg.Add(1)
		}
		s.mu.Unlock()
		release()
		if sweep {
			defer s.wg.Done()
			s.idle(context.WithoutCancel(ctx))
		}
		return
	}
	wait := s.cfg.SessionIdle
	if se.failed() {
		wait = min(wait, failureHold)
	}
	s.wg.Add(1)
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		defer s.wg.Done()
		s.mu.Lock()
		if se.idle != timer { // someone came in the meantime
			s.mu.Unlock()
			return
		}
		release := s.end(se)
		s.mu.Unlock()
		release()
		s.idle(context.WithoutCancel(ctx))
	})
	se.idle = timer
	s.mu.Unlock()
}

func (se *session) isResolved() bool {
	select {
	case <-se.resolved:
		return true
	default:
		return false
	}
}

func (se *session) failed() bool { return se.isResolved() && se.err != nil }

// end takes a session off the books. s.mu is held; when it no longer is, the caller calls release, which lets go of what the
// session holds.
func (s *sessions) end(se *session) (release func()) {
	if s.live[se.key] == se {
		delete(s.live, se.key)
	}
	se.ended = true
	held, unpins, complete, whole := se.jobs, se.unpins, se.complete, se.whole
	se.jobs, se.unpins = map[digest.Digest]*job{}, nil
	return func() {
		se.cancel()
		pulled := se.trace.end(complete)
		if !whole { // who only asked has not pulled
			s.jobs.metrics.pulled(&pulled)
			pulled.log(s.cfg.Logger)
		}
		for _, j := range held {
			s.jobs.leave(j)
		}
		for _, unpin := range unpins {
			unpin()
		}
	}
}

// shut ends all sessions and waits for what they began. Prepares under way see their jobs end, and then end theirs.
func (s *sessions) shut() {
	s.mu.Lock()
	s.closed = true
	var releases []func()
	for _, se := range s.live {
		se.cancel()
		if se.idle != nil && se.idle.Stop() {
			se.idle = nil
			releases = append(releases, s.end(se))
			s.wg.Done()
		}
	}
	s.mu.Unlock()
	for _, release := range releases {
		release()
	}
	s.wg.Wait()
}

// find is the image's layer that a Prepare is about.
func (se *session) find(t *target) (registry.Layer, error) {
	for _, l := range se.image.Layers {
		if l.Digest == t.layer && (t.diffID == "" || l.DiffID == t.diffID) {
			return l, nil
		}
	}
	return registry.Layer{}, errForeign
}

var errForeign = errors.New("image has no such layer")
