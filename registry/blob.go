package registry

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// blob is one open layer, or a part of it. The dispatcher, the spans it starts
// and the watch over them share it with the reader.
type blob struct {
	repo     *repository
	layer    Layer
	off, end int64 // the part that is read
	sites    []site
	site     atomic.Int32 // index into sites, moves on as mirrors fail
	cancel   context.CancelFunc
	tasks    sync.WaitGroup // dispatcher, watch and fetches

	reserve  chan struct{} // one token, for the block of the span being read
	read     atomic.Int64  // where the span that the reader stands at begins
	moved    chan struct{} // has an element if read has grown
	wide     atomic.Int64  // spans that may be fetched ahead, see reader.widen
	queue    chan *span    // in order, closed by the dispatcher
	ended    error         // why the dispatcher stopped, valid when queue is closed
	answered chan struct{} // closed when the first span knows how the host answers
	failed   chan struct{} // closed when a span has failed for good

	answerOnce, failOnce sync.Once

	mu     sync.Mutex // guards what follows
	spans  []*span    // those that were started and are not read to their end
	tail   *span      // takes the rest of the blob as one stream
	hedged int64      // bytes that were asked for twice
}

// span is a part of a blob that one fetch brings.
type span struct {
	off, end int64         // as it was started; the tail's fetch goes on to the end of the blob
	out      chan *block   // filled blocks in order, closed by the fetch
	err      error         // valid when out is closed
	head     chan struct{} // closed when the reader stands here
	cancel   context.CancelFunc

	turn  chan struct{} // an element that who hands blocks over holds
	given atomic.Int64  // the bytes before it are handed over; written by who has the turn
	race
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
	return c.OpenRange(ctx, ref, l, 0, l.Size)
}

// OpenRange is Open for the length bytes of l at off, for those who want parts
// of a blob in an order of their own. All readers share one memory budget. From
// a host that ignores ranges everything before off comes too, and is dropped.
func (c *Client) OpenRange(ctx context.Context, ref string, l Layer, off, length int64) (io.ReadCloser, error) {
	if err := l.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("open layer %q: %w", l.Digest, err)
	}
	if off < 0 || length < 0 || length > l.Size-off {
		return nil, fmt.Errorf("open layer %s: %d bytes at %d of %d: %w", l.Digest, length, off, l.Size, ErrSize)
	}
	repo, _, err := c.repository(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("open layer %s: %w", l.Digest, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	b := &blob{
		repo: repo, layer: l, off: off, end: off + length, cancel: cancel,
		sites:    repo.with(docker.HostCapabilityPull),
		reserve:  newTokens(1),
		moved:    make(chan struct{}, 1),
		queue:    make(chan *span, c.cfg.MemoryBytes/c.minRange()+minAhead+1),
		answered: make(chan struct{}),
		failed:   make(chan struct{}),
	}
	b.read.Store(off)
	b.wide.Store(2 * startParallel)
	c.budget.enter()
	b.tasks.Go(func() { b.run(ctx) })
	b.tasks.Go(func() { b.hedgeLate(ctx) })
	return &reader{blob: b, off: off}, nil
}

// minAhead is how many spans a blob may have ahead of its reader however short
// memory is: one to be read, and one to come meanwhile.
const minAhead = 2

// run is the dispatcher: it starts spans in order, as fast as the host's pacer
// lets it, and none further ahead of the reader than the window. Until a host
// has shown that it honours ranges, the first span goes alone.
func (b *blob) run(ctx context.Context) {
	defer func() {
		b.ended = context.Cause(ctx)
		close(b.queue)
	}()
	for off := b.off; off < b.end; {
		size, ahead := b.shape(off)
		for off-b.read.Load() >= ahead {
			if !b.await(ctx, b.moved) {
				return
			}
			size, ahead = b.shape(off)
		}
		right := b.right(ctx)
		if ctx.Err() != nil {
			right.park()
			return
		}
		sctx, cancel := context.WithCancel(ctx)
		s := b.start(off, size, cancel)
		if s == nil {
			cancel()
			right.park()
			return
		}
		b.queue <- s // has room for the window
		b.tasks.Go(func() { b.fetch(sctx, s, right) })
		if off == b.off && !b.rangesKnown() && !b.await(ctx, b.answered) {
			return
		}
		off += size
	}
}

// shape is how large the span at off should be, and how many bytes ahead of the
// reader may be fetched. Both follow the host's pacer and the blob's share of
// memory. Towards the end spans get smaller, so that they end together. From a
// far registry all that memory allows is fetched ahead: a link that idles while
// the reader is busy does not make up for it later, and the reader may.
func (b *blob) shape(off int64) (size, ahead int64) {
	c := b.repo.client
	least := c.minRange()
	size, share, parallel := least, c.budget.share(), int64(1)
	if at := b.current(); at != nil {
		rangeBytes, worth, limit, far := at.shape()
		parallel = max(int64(limit)/max(c.budget.open.Load(), 1), 1)
		size = max(min(rangeBytes, share/(parallel+parallel/2), max((b.end-off)/parallel, worth)), least)
		if far {
			return min(size, b.end-off), max(share, minAhead*size)
		}
	}
	wide := min(parallel+parallel/2+1, b.wide.Load())
	return min(size, b.end-off), max(min(size*wide, share), minAhead*size)
}

// current is the site that is asked now, or nil if there is none.
func (b *blob) current() *site {
	if len(b.sites) == 0 {
		return nil
	}
	return &b.sites[b.site.Load()]
}

// right waits until the current site may be asked for one more range. It is nil
// if that cannot be; the span's own attempt then finds out why, or another site.
func (b *blob) right(ctx context.Context) *lease {
	at := b.current()
	if at == nil {
		return nil
	}
	right, err := at.acquire(ctx, false, at.last)
	if err != nil {
		return nil
	}
	return right
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
	at := b.current()
	return at != nil && at.ranges.Load()
}

// start adds the span at off, or returns nil if an earlier one takes the rest.
func (b *blob) start(off, size int64, cancel context.CancelFunc) *span {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tail != nil {
		return nil
	}
	s := &span{
		off: off, end: off + size,
		out:    make(chan *block, (size-1)/int64(b.repo.client.budget.blockBytes)+2), // and the reserve
		head:   make(chan struct{}),
		cancel: cancel,
		turn:   newTokens(1),
	}
	s.given.Store(off)
	b.spans = append(b.spans, s)
	return s
}

// done tells the dispatcher that the reader is through with s, the first span.
func (b *blob) done(s *span) {
	b.mu.Lock()
	b.spans = slices.Delete(b.spans, 0, 1)
	b.mu.Unlock()
	b.read.Store(s.end)
	select {
	case b.moved <- struct{}{}:
	default:
	}
}

// takeRest makes s the last span, because its host sends everything whatever
// range it is asked for. Spans after it are cancelled, and what they have
// fetched is given back. It is false if an earlier span has done so, or if its
// second fetch has brought all of s.
func (b *blob) takeRest(s *span) bool {
	b.mu.Lock()
	if b.tail != nil && b.tail.off < s.off {
		b.mu.Unlock()
		return false
	}
	if b.tail != s && !s.claim() {
		b.mu.Unlock()
		return false
	}
	b.tail = s
	later := slices.Clone(b.spans[slices.Index(b.spans, s)+1:])
	b.mu.Unlock()
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
