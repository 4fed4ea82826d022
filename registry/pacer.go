package registry

import (
	"context"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// maxThrottles bounds the pause of a host that says it is busy but not for how long: backoffBase doubled so often.
const maxThrottles = 6

// pacer says when a request may go to a host. All blobs that come from the host share it, so that many images at once ask for
// no more than one does: how many requests is the tuner's to find out, and a host that says it is busy is left alone by all.
// Who waits is served in the order of asking; as each blob asks for one range at a time, that is also fair.
type pacer struct {
	metrics *metrics
	bytes   atomic.Int64 // body bytes that have come from the host

	mu        sync.Mutex // guards what follows
	tune      *tuner
	busy      int         // leases that are held
	queue     []*turn     // who waits for one
	until     time.Time   // the host wants to be left alone until then
	why       error       // what it said
	throttles int         // in a row, without a range between
	reopen    *time.Timer // serves the queue at until
}

// turn is a place in the queue. Its channel is closed when it is served, or refused because the host wants to be left alone.
type turn struct {
	served  chan struct{}
	patient bool // waits however long, within its context
	refused error
}

func newPacer(m *metrics, maxParallel int, minRange, maxRange int64) *pacer {
	return &pacer{metrics: m, tune: newTuner(maxParallel, minRange, maxRange, time.Now())}
}

// lease is the right to have one request at the host. It belongs to one goroutine.
type lease struct {
	pacer *pacer
	held  bool
}

// acquire waits for a lease. Who goes on with something that was begun goes before who begins. If the host wants to be left alone
// it fails with what the host said: at once for who is not patient, having another host to ask, and for a ctx that ends before.
func (p *pacer) acquire(ctx context.Context, begun, patient bool) (*lease, error) {
	p.mu.Lock()
	now := time.Now()
	if now.Before(p.until) {
		end, ok := ctx.Deadline()
		late := ok && end.Before(p.until)
		if why := p.why; late || !patient {
			p.mu.Unlock()
			return nil, why
		}
	}
	t := &turn{served: make(chan struct{}), patient: patient}
	if begun {
		p.queue = slices.Insert(p.queue, 0, t)
	} else {
		p.queue = append(p.queue, t)
	}
	p.serve(now)
	p.mu.Unlock()
	select {
	case <-t.served:
		if t.refused != nil {
			return nil, t.refused
		}
		return &lease{pacer: p, held: true}, nil
	case <-ctx.Done():
		p.leave(t)
		return nil, context.Cause(ctx)
	}
}

// leave gives up a place in the queue.
func (p *pacer) leave(t *turn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.queue, t); i >= 0 {
		p.queue = slices.Delete(p.queue, i, i+1)
	} else if t.refused == nil {
		p.busy-- // it was served meanwhile
	}
	p.serve(time.Now())
}

// spare returns a lease for a request that is not needed but may help, or nil. It goes one above the limit, as what it helps
// holds a lease that brings little.
func (p *pacer) spare() *lease {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.busy > p.tune.limit || now.Before(p.until) {
		return nil
	}
	p.busy++
	p.tune.mark(now, p.wanting())
	return &lease{pacer: p, held: true}
}

// park gives the lease up, for good or while its holder waits for something else than the host, so that a consumer that stalls
// keeps no one from the host. Of a lease that is nil or given up already it does nothing.
func (l *lease) park() {
	if l == nil || !l.held {
		return
	}
	l.held = false
	p := l.pacer
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.tune.mark(now, p.wanting())
	p.busy--
	p.tune.judge(now, p.bytes.Load())
	p.serve(now)
}

// resume takes a parked lease again, at once: its request is under way. So there may be more leases than the limit for a while,
// one for each blob at most, as a blob that is short of memory has memory for one range only.
func (l *lease) resume() {
	if l == nil || l.held {
		return
	}
	l.held = true
	p := l.pacer
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tune.mark(time.Now(), p.wanting())
	p.busy++
}

// wanting says whether someone waits who could have gone with a higher limit. The caller holds mu.
func (p *pacer) wanting() bool { return p.busy >= p.tune.limit && len(p.queue) > 0 }

// serve hands out what may be handed out. The caller holds mu.
func (p *pacer) serve(now time.Time) {
	p.tune.mark(now, p.wanting())
	for len(p.queue) > 0 && p.busy < p.tune.limit && !now.Before(p.until) {
		close(p.queue[0].served)
		p.queue = p.queue[1:]
		p.busy++
	}
	p.tune.wanting = p.wanting()
}

// throttled is told of each answer that says the host has too much to do: 429, and 503 from a host that sheds load. All who ask
// this host then wait as long as it asked for, within a bound, or a time that doubles each time, and fewer ask at once.
func (p *pacer) throttled(se *StatusError) {
	if se.Code != http.StatusTooManyRequests && se.Code != http.StatusServiceUnavailable {
		return
	}
	p.metrics.throttles.Inc()
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if now.Sub(p.until) > maxRetryAfter {
		p.throttles = 0 // long ago
	}
	if !now.Before(p.until) { // else it is one of those that were under way when the host said so first
		p.throttles = min(p.throttles+1, maxThrottles)
		p.tune.cut(now, p.bytes.Load())
	}
	pause := backoff(p.throttles)
	if se.RetryAfter > 0 {
		pause = max(min(se.RetryAfter, maxRetryAfter), backoffBase)
	}
	p.queue = slices.DeleteFunc(p.queue, func(t *turn) bool {
		if !t.patient {
			t.refused = se
			close(t.served)
		}
		return !t.patient
	})
	if until := now.Add(pause); until.After(p.until) {
		p.until, p.why = until, se
		if p.reopen != nil {
			p.reopen.Stop()
		}
		p.reopen = time.AfterFunc(pause, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.serve(time.Now())
		})
	}
}

// closed says whether the host wants to be left alone now.
func (p *pacer) closed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.until)
}

// sample is told how long a range of so many bytes took to its first byte and in all, if it waited for nothing but the host.
func (p *pacer) sample(bytes int64, first, all time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.throttles = 0
	p.tune.sample(bytes, first, all)
	p.serve(time.Now())
}

// shape is how large a range should be now, how small at the least, and how many there may be at once.
func (p *pacer) shape() (rangeBytes, worth int64, parallel int, far bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tune.rangeBytes(), p.tune.worth(), p.tune.limit, p.tune.far()
}

// overdue is the time in which a range of so many bytes should have come by far; 0 if that is not known yet.
func (p *pacer) overdue(bytes int64) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tune.overdue(bytes)
}
