package layer

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// blockSize is what the stages hand one another: large enough that a hand-over costs nothing, small enough to stay in the
	// caches between two stages.
	blockSize = 512 << 10
	// blockMemory is what a block takes: behind the window of earlier output that a decoder may want to see before its own.
	blockMemory = (window + blockSize + slack + 4095) &^ 4095
	// inBlocks is how many compressed blocks a layer may hold: one being read, one queued, one being decompressed.
	inBlocks = 3
	// ownBlocks is how many decompressed blocks a layer is sure of. The parser can hold one while it waits for the next, so
	// three would do; the fourth lets decompression run on meanwhile.
	ownBlocks = 4
	// layerBlocks is what a layer needs to be admitted.
	layerBlocks = inBlocks + ownBlocks
)

// arena owns the memory of all layers in flight: at most total blocks, mapped outside the garbage-collected heap so that they
// count once and not twice against the memory of the process. A layer is admitted when its guaranteed blocks are free, and
// borrows what else is free; so one layer alone is as fast as the budget allows, and many cannot block one another. Decoders of
// large frames are paid for with blocks that are not mapped meanwhile: see loan.
type arena struct {
	total     int
	most      int               // blocks that a loan may have
	seats     chan struct{}     // one for each layer that may be admitted; what they are sure of leaves room for one loan of most blocks
	tokens    chan struct{}     // one for each block that nobody owns
	admit     chan struct{}     // held while a layer collects its guaranteed tokens, so that two half-admitted layers cannot deadlock
	borrow    chan struct{}     // held while a loan collects its tokens, likewise
	lentBytes func(bytes int64) // told of lent

	short atomic.Int32 // how many wait for tokens that they have to have; then nobody takes one that he can do without

	mu     sync.Mutex // guards what follows; mapped blocks and lent ones are never more than total
	free   []*block
	mapped int
	lent   int
	idle   []*loan
	layers int
}

// block is one piece of a stream. The stages that share it hold a reference each; the last release gives it back.
type block struct {
	mem   []byte // blockMemory, mapped
	data  []byte // the part of mem that is filled
	refs  atomic.Int32
	token chan<- struct{} // where its token goes back to
	quota *quota
}

// newArena makes an arena of so many bytes, or of as many as one layer needs. lentBytes may be nil.
func newArena(bytes int64, lentBytes func(bytes int64)) *arena {
	n := max(int(bytes/blockMemory), layerBlocks)
	most := min(max(min(n*3/4, wideLoan), n*3/5), n-layerBlocks)
	if lentBytes == nil {
		lentBytes = func(int64) {}
	}
	lentBytes(0)
	return &arena{
		total: n, most: most, lentBytes: lentBytes,
		seats: tokens((n - most) / layerBlocks), tokens: tokens(n), admit: tokens(1), borrow: tokens(1),
	}
}

func tokens(n int) chan struct{} {
	c := make(chan struct{}, n)
	for range n {
		c <- struct{}{}
	}
	return c
}

// quota is one layer's share of the arena.
type quota struct {
	arena *arena
	in    chan struct{}
	own   chan struct{}

	mu       sync.Mutex // guards what follows, and the tokens of live blocks
	live     map[*block]struct{}
	borrowed int // live blocks whose token is the arena's
}

// open admits a layer, waiting for its guaranteed blocks.
func (a *arena) open(ctx context.Context) (*quota, error) {
	if err := enter(ctx, a.seats); err != nil {
		return nil, err
	}
	if err := a.sure(ctx); err != nil {
		a.seats <- struct{}{}
		return nil, err
	}
	a.mu.Lock()
	a.layers++
	a.mu.Unlock()
	return &quota{arena: a, in: tokens(inBlocks), own: tokens(ownBlocks), live: map[*block]struct{}{}}, nil
}

// sure collects the guaranteed tokens of a layer.
func (a *arena) sure(ctx context.Context) error {
	if err := enter(ctx, a.admit); err != nil {
		return err
	}
	defer func() { a.admit <- struct{}{} }()
	return a.collect(ctx, layerBlocks)
}

// enter takes one of c.
func enter(ctx context.Context, c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// collect takes n tokens, or none. What others can do without gives way.
func (a *arena) collect(ctx context.Context, n int) error {
	for i := range n {
		select {
		case <-a.tokens:
			continue
		default:
		}
		a.short.Add(1)
		a.dropIdle()
		err := enter(ctx, a.tokens)
		a.short.Add(-1)
		if err != nil {
			for range i {
				a.tokens <- struct{}{}
			}
			return err
		}
	}
	return nil
}

// close takes back every block of the layer, also those that a failed stage left behind; no stage may run any more. With the
// last layer gone the memory goes back to the system.
func (q *quota) close() {
	for b := range q.live {
		q.arena.put(b)
		b.token <- struct{}{}
	}
	q.live = nil
	for range layerBlocks {
		q.arena.tokens <- struct{}{}
	}
	q.arena.left()
	q.arena.seats <- struct{}{}
}

func (a *arena) left() {
	a.mu.Lock()
	a.layers--
	last := a.layers == 0
	if last {
		a.unmap(0)
	}
	a.mu.Unlock()
	if last {
		a.dropIdle()
	}
}

// unmap keeps so many free blocks at most. The caller holds mu.
func (a *arena) unmap(keep int) {
	for len(a.free) > keep {
		last := len(a.free) - 1
		_ = unix.Munmap(a.free[last].mem)
		a.free[last] = nil
		a.free = a.free[:last]
		a.mapped--
	}
}

// input waits for a block to read compressed bytes into.
func (q *quota) input(ctx context.Context) (*block, error) {
	select {
	case <-q.in:
		return q.block(q.in)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// output waits for a block to decompress into: a guaranteed one, or one that no layer needs now.
func (q *quota) output(ctx context.Context) (*block, error) {
	token, err := q.outputToken(ctx)
	if err != nil {
		return nil, err
	}
	return q.block(token)
}

func (q *quota) outputToken(ctx context.Context) (chan<- struct{}, error) {
	select {
	case <-q.own:
		return q.own, nil
	default:
	}
	shared := q.arena.tokens
	if q.arena.short.Load() > 0 {
		shared = nil
	}
	select {
	case <-q.own:
		return q.own, nil
	case <-shared:
		return q.arena.tokens, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// promote makes an input block an output block, for a layer that is not compressed.
func (q *quota) promote(ctx context.Context, b *block) error {
	token, err := q.outputToken(ctx)
	if err != nil {
		return err
	}
	q.mu.Lock()
	b.token, token = token, b.token
	q.count(b, 1)
	q.mu.Unlock()
	token <- struct{}{}
	return nil
}

func (q *quota) block(token chan<- struct{}) (*block, error) {
	b, err := q.arena.get()
	if err != nil {
		token <- struct{}{}
		return nil, err
	}
	b.token, b.quota, b.data = token, q, nil
	b.refs.Store(1)
	q.mu.Lock()
	q.live[b] = struct{}{}
	q.count(b, 1)
	q.mu.Unlock()
	return b, nil
}

// count keeps borrowed. The caller holds mu.
func (q *quota) count(b *block, n int) {
	if b.token == q.arena.tokens {
		q.borrowed += n
	}
}

func (b *block) retain(n int32) { b.refs.Add(n) }

func (b *block) release() {
	if b.refs.Add(-1) != 0 {
		return
	}
	q := b.quota
	q.mu.Lock()
	delete(q.live, b)
	q.count(b, -1)
	token := q.returned(b)
	q.mu.Unlock()
	q.arena.put(b)
	token <- struct{}{}
}

// returned is where the token of a block goes that is not needed any more: as long as the layer borrows, what it gives back is
// borrowed, so that one that waits holds nothing that others may wait for. The caller holds mu.
func (q *quota) returned(b *block) chan<- struct{} {
	if b.token != q.own || q.borrowed == 0 {
		return b.token
	}
	for other := range q.live {
		if other.token == q.arena.tokens {
			other.token = q.own
			q.borrowed--
			return q.arena.tokens
		}
	}
	return b.token
}

func (a *arena) get() (*block, error) {
	a.mu.Lock()
	if n := len(a.free); n > 0 {
		b := a.free[n-1]
		a.free = a.free[:n-1]
		a.mu.Unlock()
		return b, nil
	}
	a.mapped++
	a.mu.Unlock()
	mem, err := unix.Mmap(-1, 0, blockMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		a.mu.Lock()
		a.mapped--
		a.mu.Unlock()
		return nil, fmt.Errorf("map a block: %w", err)
	}
	return &block{mem: mem}, nil
}

func (a *arena) put(b *block) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.quota, b.data = nil, nil
	a.free = append(a.free, b)
}
