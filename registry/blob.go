package registry

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// blob is one open layer. The dispatcher and the spans it starts share it with
// the reader.
type blob struct {
	repo   *repository
	layer  Layer
	sites  []site
	site   atomic.Int32 // index into sites, moves on as mirrors fail
	cancel context.CancelFunc
	tasks  sync.WaitGroup // dispatcher and fetches

	reserve  chan struct{} // one token, for the block of the span being read
	window   chan struct{} // spans that may still be started before one is read
	queue    chan *span    // in order, closed by the dispatcher
	ended    error         // why the dispatcher stopped, valid when queue is closed
	answered chan struct{} // closed when the first span knows how the host answers
	failed   chan struct{} // closed when a span has failed for good

	answerOnce, failOnce sync.Once

	mu    sync.Mutex // guards spans and tail
	spans []*span    // all that were started
	tail  *span      // takes the rest of the blob as one stream
}

// span is a part of a blob that one fetch brings.
type span struct {
	index    int
	off, end int64         // end is moved by its own fetch only
	out      chan *block   // filled blocks in order, closed by the fetch
	err      error         // valid when out is closed
	head     chan struct{} // closed when the reader stands here
	cancel   context.CancelFunc
}

// Open streams the blob of l, an image layer of ref's repository, in order. It
// starts fetching at once and returns without waiting: what goes wrong is
// returned by Read, after the bytes that came before. Exactly l.Size bytes are
// read, or the error is not io.EOF; they are not verified.
//
// The reader must be closed: that cancels what is in flight and waits for it.
// So does the end of ctx. Read belongs to one goroutine; Close may come from
// another.
//
// Errors of Read: ErrNotFound, ErrUnauthorized, *StatusError, ErrSize,
// ErrProtocol, io.ErrUnexpectedEOF (a body that always breaks off), what broke
// the connection, or ctx's.
func (c *Client) Open(ctx context.Context, ref string, l Layer) (io.ReadCloser, error) {
	if err := l.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("open layer %q: %w", l.Digest, err)
	}
	if l.Size < 0 {
		return nil, fmt.Errorf("open layer %s: size %d: %w", l.Digest, l.Size, ErrSize)
	}
	repo, _, err := c.repository(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("open layer %s: %w", l.Digest, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	ahead := 2 * c.cfg.Parallel
	b := &blob{
		repo: repo, layer: l, cancel: cancel,
		sites:    repo.with(docker.HostCapabilityPull),
		reserve:  newTokens(1),
		window:   newTokens(ahead),
		queue:    make(chan *span, ahead),
		answered: make(chan struct{}),
		failed:   make(chan struct{}),
	}
	b.tasks.Go(func() { b.run(ctx) })
	return &reader{blob: b}, nil
}

// run is the dispatcher: it starts spans in order, Parallel at a time, and none
// further ahead of the reader than the window. Until a host has shown that it
// honours ranges, the first span goes alone.
//
// This is the place to vary the number in flight by measured throughput, and to
// ask twice for a span that lags behind its neighbours.
func (b *blob) run(ctx context.Context) {
	defer func() {
		b.ended = context.Cause(ctx)
		close(b.queue)
	}()
	c := b.repo.client
	parallel := newTokens(c.cfg.Parallel)
	for off := int64(0); off < b.layer.Size; off += int64(c.cfg.RangeBytes) {
		if !b.await(ctx, b.window) || !b.await(ctx, parallel) {
			return
		}
		sctx, cancel := context.WithCancel(ctx)
		s := b.start(off, cancel)
		if s == nil {
			cancel()
			return
		}
		b.queue <- s // has room for the window
		b.tasks.Go(func() {
			defer func() { parallel <- struct{}{} }()
			b.fetch(sctx, s)
		})
		if off == 0 && !b.rangesKnown() && !b.await(ctx, b.answered) {
			return
		}
	}
}

// await waits for c unless there is no more reason to start spans.
func (b *blob) await(ctx context.Context, c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	case <-b.failed:
	case <-ctx.Done():
	}
	return false
}

func (b *blob) rangesKnown() bool {
	return len(b.sites) > 0 && b.sites[0].ranges.Load()
}

// start adds the span at off, or returns nil if an earlier one takes the rest.
func (b *blob) start(off int64, cancel context.CancelFunc) *span {
	cfg := &b.repo.client.cfg
	blocks := (cfg.RangeBytes-1)/b.repo.client.budget.blockBytes + 1
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tail != nil {
		return nil
	}
	s := &span{
		index:  len(b.spans),
		off:    off,
		end:    min(off+int64(cfg.RangeBytes), b.layer.Size),
		out:    make(chan *block, blocks),
		head:   make(chan struct{}),
		cancel: cancel,
	}
	b.spans = append(b.spans, s)
	return s
}

// takeRest makes s the last span, because its host sends everything whatever
// range it is asked for. Spans after it are cancelled, and what they have
// fetched is given back. It is false if an earlier span has done so.
func (b *blob) takeRest(s *span) bool {
	b.mu.Lock()
	if b.tail != nil && b.tail.index < s.index {
		b.mu.Unlock()
		return false
	}
	b.tail = s
	later := b.spans[s.index+1:]
	b.mu.Unlock()
	s.end = b.layer.Size
	for _, l := range later {
		l.cancel()
	}
	for _, l := range later {
		l.drain(b.repo.client.budget)
	}
	return true
}

// drain waits for the fetch of s to end and gives its blocks back.
func (s *span) drain(b *budget) {
	for blk := range s.out {
		b.give(blk)
	}
}
