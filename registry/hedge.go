package registry

import (
	"context"
	"sync"
	"time"
)

const (
	// watchEvery is how often the spans of a blob are looked at.
	watchEvery = 100 * time.Millisecond
	// hedgeShare bounds what is asked for twice: one byte in so many of those asked for, and one range.
	hedgeShare = 16
)

// race is a span's second fetch, if the first is late: both read on from where the span stands, each block is taken from who has
// it first, and who comes to the end first stops the other. So a connection that hangs or crawls, as one of many to a store with
// many servers may, holds up the reader no longer than others need for the same.
type race struct {
	mu     sync.Mutex         // guards what follows
	since  time.Time          // when the first fetch began to wait for the host, zero if it does not
	waited time.Duration      // before that
	over   bool               // nobody may stop the first fetch any more, nor join it
	stop   context.CancelFunc // stops the second; nil if there is none
	second sync.WaitGroup
}

// run says that the first fetch waits for the host from now on, and rest that it waits for something else.
func (r *race) run() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.since = time.Now()
}

func (r *race) rest() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.since.IsZero() {
		r.waited += time.Since(r.since)
		r.since = time.Time{}
	}
}

// late says whether the first fetch has waited for the host longer than limit, and has no second.
func (r *race) late(now time.Time, limit time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.over && r.stop == nil && !r.since.IsZero() && r.waited+now.Sub(r.since) > limit
}

// join adds a second fetch, which stop stops and which is waited for. It is false if it comes too late.
func (r *race) join(stop context.CancelFunc) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return false
	}
	r.stop = stop
	r.second.Add(1)
	return true
}

// claim is true for the first who calls it: the second fetch to stop the first, or the first to go on beyond the span, or to end.
func (r *race) claim() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.over
	r.over = true
	return !was
}

// finish ends the second fetch and waits for it.
func (r *race) finish() {
	r.claim()
	if r.stop != nil { // no one joins any more
		r.stop()
	}
	r.second.Wait()
}

// hedgeLate looks for spans that are late, until ctx ends: the reader is through.
func (b *blob) hedgeLate(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if s := b.laggard(time.Now()); s != nil {
			b.hedge(ctx, s)
		}
	}
}

// laggard returns the first span that should be asked for again, if it may be, and counts it as asked for.
func (b *blob) laggard(now time.Time) *span {
	at := b.current()
	if at == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tail != nil || len(b.spans) == 0 {
		return nil
	}
	asked := b.spans[len(b.spans)-1].end - b.off
	for _, s := range b.spans {
		limit := at.overdue(s.end - s.off)
		if limit == 0 {
			return nil
		}
		left := s.end - s.given.Load()
		if !s.late(now, limit) {
			continue
		}
		if b.hedged > 0 && b.hedged+left > asked/hedgeShare {
			return nil
		}
		b.hedged += left
		return s
	}
	return nil
}

// hedge starts the second fetch of s, if the host may be asked.
func (b *blob) hedge(ctx context.Context, s *span) {
	at, metrics := *b.current(), b.repo.client.metrics
	right := at.spare()
	if right == nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	if !s.join(cancel) {
		cancel()
		right.park()
		return
	}
	go func() { // race waits for it
		defer s.second.Done()
		defer cancel()
		from := s.given.Load()
		c := &cursor{span: s, pos: from, end: s.end, lease: right, hedge: true, awaited: metrics.awaited}
		err := b.attempt(ctx, at, c)
		b.repo.client.budget.give(c.blk)
		metrics.hedgedBytes.Add(float64(c.pos - from))
		b.repo.client.log.Debug("registry range asked for twice", "from", from, "to", s.end, "first", c.last, "error", err)
		if !c.last {
			metrics.hedges.WithLabelValues("lost").Inc()
			return
		}
		metrics.hedges.WithLabelValues("won").Inc()
		if s.claim() {
			s.cancel()
		}
	}()
}
