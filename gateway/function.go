package gateway

import (
	"container/list"
	"context"
	"sync"
	"time"
)

// function is the admission of one Function: it hands out slots of its endpoints, keeps those who wait in order of arrival,
// and knows how many activations are under way. Its one invariant: after every change, nobody waits while a slot is free.
//
// The shape (a bounded number may wait, a bounded number may run, a slot goes to the longest waiter) is that of the breaker
// in Knative's queue proxy.
type function struct {
	name    string
	config  *Config
	metrics *functionMetrics
	wake    func(*function) // has the dispatcher look at the queue soon; never blocks
	hurry   func()          // has the reporter send what is urgent; never blocks

	mu        sync.Mutex // guards everything below; never held over I/O
	version   int64
	deleted   bool
	revision  string
	limits    limits
	endpoints []*endpoint
	gone      recent // Instances that have left: a late Allocate reply must not bring one back
	turn      int    // where to look first, so that equals take turns
	waiting   list.List
	starting  int       // activations in flight
	failures  int       // rounds of activations that failed since one succeeded
	retryAt   time.Time // no activation before
	full      bool      // the last one failed for want of room, which Instances take up that are out of rotation
	alarm     *time.Timer
	meter     meter
	reported  bool // the last report had load
	urgent    bool // the first request of an idle time is not yet reported
	retired   []*endpoint
	releaseAt time.Time // no Instance is given back as unhealthy before
}

// waiter is one request in the queue. Its fields are set under the function's mutex before ready is closed.
type waiter struct {
	since time.Time
	place *list.Element // nil when it is no longer in the queue
	ready chan struct{}
	lease lease
	err   error
}

// lease is one slot of one endpoint. Whoever has it gives it back with done or failed, once.
type lease struct {
	endpoint *endpoint
	waited   bool // it came through the queue
	awaited  bool // and an activation was, or is still, part of the wait
}

func newFunction(name string, config *Config, m *functionMetrics, wake func(*function), hurry func(), now time.Time) *function {
	return &function{
		name: name, config: config, metrics: m, wake: wake, hurry: hurry, limits: limitsOf(nil),
		meter: meter{since: now, last: now},
	}
}

// unlock also lets go of what the change retired: closing connections is I/O.
func (f *function) unlock() {
	retired := f.retired
	f.retired = nil
	f.mu.Unlock()
	for _, e := range retired {
		e.close()
	}
}

// timeout is the Function's time from arrival to first byte.
func (f *function) timeout() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.limits.timeout
}

// admit gives a new request a slot, or a place in the queue to await, or a *refusal.
func (f *function) admit(now time.Time) (lease, *waiter, error) {
	f.mu.Lock()
	defer f.unlock()
	if f.deleted {
		return lease{}, nil, unknownFunction(f.name)
	}
	f.count(now)
	if f.waiting.Len() == 0 {
		if e := f.pick(now, nil); e != nil {
			return f.take(e, now), nil, nil
		}
	}
	if f.waiting.Len() >= f.limits.queue {
		return lease{}, nil, queueFull(f.name, f.limits.queue)
	}
	w := &waiter{since: now, ready: make(chan struct{})}
	w.place = f.waiting.PushBack(w)
	f.meter.change(now, 1)
	f.wake(f)
	return lease{}, w, nil
}

// readmit does so for a request that has had a slot on which nothing could be sent: it is older than all who wait. It
// avoids the endpoint that failed if there is another.
func (f *function) readmit(now time.Time, avoid *endpoint) (lease, *waiter, error) {
	f.mu.Lock()
	defer f.unlock()
	if f.deleted {
		return lease{}, nil, unknownFunction(f.name)
	}
	if e := f.pick(now, avoid); e != nil {
		return f.take(e, now), nil, nil
	}
	w := &waiter{since: now, ready: make(chan struct{})}
	w.place = f.waiting.PushFront(w)
	f.meter.change(now, 1)
	f.wake(f)
	return lease{}, w, nil
}

// await blocks until the waiter has a slot or a refusal, or ctx ends; then its cause is the error and the place is given up.
func (f *function) await(ctx context.Context, w *waiter) (lease, error) {
	select {
	case <-w.ready:
		return w.lease, w.err
	case <-ctx.Done():
	}
	f.leave(w)
	return lease{}, context.Cause(ctx)
}

// leave gives up a place in the queue, or the slot that came in the same moment.
func (f *function) leave(w *waiter) {
	f.mu.Lock()
	defer f.unlock()
	now := time.Now()
	switch {
	case w.place != nil:
		f.waiting.Remove(w.place)
		w.place = nil
		f.meter.change(now, -1)
	case w.err == nil:
		f.free(w.lease.endpoint, now)
	}
}

// done gives a slot back after use.
func (f *function) done(l lease, now time.Time) {
	f.mu.Lock()
	defer f.unlock()
	f.free(l.endpoint, now)
}

// failed gives a slot back whose Instance failed. It says whether the endpoint is out of rotation, whether it had been before, so that
// this was no surprise, and whether that was its last chance.
func (f *function) failed(l lease, how failure, now time.Time) (putAway, suspect, condemned bool) {
	f.mu.Lock()
	defer f.unlock()
	e := l.endpoint
	suspect = e.suspect()
	putAway = e.failed(now, how, f.lives(now) <= 1)
	if condemned = e.strikes >= strikesAllowed; condemned {
		e.strikes = 0
	}
	if putAway && how != reset && !e.confirmed { // all that spoke for it is one reply; should poolmanager still name it, an event will
		e.omitted, e.trustUntil = true, time.Time{}
	}
	f.free(e, now)
	return putAway, suspect, condemned
}

// answered notes that an endpoint's Instance is well.
func (f *function) answered(e *endpoint) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e.answered()
}

// startOf is how an endpoint was started, or nil.
func (f *function) startOf(e *endpoint) *start {
	f.mu.Lock()
	defer f.mu.Unlock()
	return e.start
}

// The methods below are called with mu held.

func (f *function) count(now time.Time) {
	idle := f.meter.current == 0 && f.meter.requests == 0 && !f.reported
	f.meter.advance(now)
	f.meter.requests++
	if idle {
		f.urgent = true
		f.hurry()
	}
}

func (f *function) take(e *endpoint, now time.Time) lease {
	e.inFlight++
	f.meter.change(now, 1)
	return lease{endpoint: e}
}

func (f *function) free(e *endpoint, now time.Time) {
	e.inFlight--
	f.meter.change(now, -1)
	f.sweep(now)
	f.pump(now)
	if f.waiting.Len() > 0 {
		f.wake(f)
	}
}

// pick is the endpoint with the fewest requests in flight that takes another, or nil. One that was put away and may be
// tried again comes last.
func (f *function) pick(now time.Time, avoid *endpoint) *endpoint {
	var best, last *endpoint
	n := len(f.endpoints)
	for i := range n {
		e := f.endpoints[(f.turn+i)%n]
		switch {
		case !e.takes(now, f.limits.concurrency):
		case e == avoid:
			last = e
		case best == nil || e.before(best):
			best = e
		}
	}
	f.turn++
	if best == nil {
		return last
	}
	return best
}

// pump gives free slots to those who wait longest.
func (f *function) pump(now time.Time) {
	for f.waiting.Len() > 0 {
		e := f.pick(now, nil)
		if e == nil {
			return
		}
		w := f.waiting.Remove(f.waiting.Front()).(*waiter)
		w.place = nil
		e.inFlight++ // the meter has counted it since it came
		w.lease = lease{endpoint: e, waited: true, awaited: e.start != nil && e.start.ended.After(w.since) || e.start == nil && f.starting > 0}
		close(w.ready)
	}
}

// refuseAll ends every wait.
func (f *function) refuseAll(why *refusal, now time.Time) {
	for f.waiting.Len() > 0 {
		w := f.waiting.Remove(f.waiting.Front()).(*waiter)
		w.place, w.err = nil, why
		f.meter.change(now, -1)
		close(w.ready)
	}
}

func (f *function) lives(now time.Time) int {
	n := 0
	for _, e := range f.endpoints {
		if e.live(now) {
			n++
		}
	}
	return n
}

// sweep forgets endpoints that poolmanager has left out and that nobody uses any more.
func (f *function) sweep(now time.Time) {
	kept := f.endpoints[:0]
	for _, e := range f.endpoints {
		if e.inFlight == 0 && (e.distrusted(now) || f.deleted) {
			f.gone.add(e.key())
			f.retired = append(f.retired, e)
			continue
		}
		kept = append(kept, e)
	}
	clear(f.endpoints[len(kept):])
	f.endpoints = kept
}

func (f *function) endpoint(key string) *endpoint {
	for _, e := range f.endpoints {
		if e.id+" "+e.claim == key {
			return e
		}
	}
	return nil
}

// recent remembers the last few ids. Allocate replies that are overtaken by events are overtaken by moments, not by hours.
type recent struct{ ids []string }

func (r *recent) add(id string) {
	if r.has(id) {
		return
	}
	if len(r.ids) >= 128 {
		r.ids = append(r.ids[:0], r.ids[64:]...)
	}
	r.ids = append(r.ids, id)
}

func (r *recent) has(id string) bool {
	for _, other := range r.ids {
		if other == id {
			return true
		}
	}
	return false
}
