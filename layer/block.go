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
// borrows what else is free; so one layer alone is as fast as the budget allows, and many cannot block one another.
type arena struct {
	tokens chan struct{} // one for each block that nobody owns
	admit  chan struct{} // held while a layer collects its guaranteed tokens, so that two half-admitted layers cannot deadlock

	mu     sync.Mutex // guards free and layers
	free   []*block
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

func newArena(bytes int64) *arena {
	n := max(int(bytes/blockMemory), layerBlocks)
	a := &arena{tokens: make(chan struct{}, n), admit: make(chan struct{}, 1)}
	for range n {
		a.tokens <- struct{}{}
	}
	return a
}

// quota is one layer's share of the arena.
type quota struct {
	arena *arena
	in    chan struct{}
	own   chan struct{}

	mu   sync.Mutex // guards live
	live map[*block]struct{}
}

// open admits a layer, waiting for its guaranteed blocks.
func (a *arena) open(ctx context.Context) (*quota, error) {
	select {
	case a.admit <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-a.admit }()
	for i := range layerBlocks {
		select {
		case <-a.tokens:
		case <-ctx.Done():
			for range i {
				a.tokens <- struct{}{}
			}
			return nil, ctx.Err()
		}
	}
	a.mu.Lock()
	a.layers++
	a.mu.Unlock()

	q := &quota{arena: a, in: make(chan struct{}, inBlocks), own: make(chan struct{}, ownBlocks), live: map[*block]struct{}{}}
	for range inBlocks {
		q.in <- struct{}{}
	}
	for range ownBlocks {
		q.own <- struct{}{}
	}
	return q, nil
}

// close takes back every block of the layer, also those that a failed stage left behind; no stage may run any more. With the
// last layer gone the memory goes back to the system.
func (q *quota) close() {
	for b := range q.live {
		b.token <- struct{}{}
		q.arena.put(b)
	}
	q.live = nil
	for range layerBlocks {
		q.arena.tokens <- struct{}{}
	}
	a := q.arena
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.layers--; a.layers == 0 {
		for _, b := range a.free {
			_ = unix.Munmap(b.mem)
		}
		a.free = nil
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
	select {
	case <-q.own:
		return q.own, nil
	case <-q.arena.tokens:
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
	q.mu.Unlock()
	return b, nil
}

func (b *block) retain(n int32) { b.refs.Add(n) }

func (b *block) release() {
	if b.refs.Add(-1) != 0 {
		return
	}
	q := b.quota
	q.mu.Lock()
	delete(q.live, b)
	token := b.token
	q.mu.Unlock()
	q.arena.put(b)
	token <- struct{}{}
}

func (a *arena) get() (*block, error) {
	a.mu.Lock()
	if n := len(a.free); n > 0 {
		b := a.free[n-1]
		a.free = a.free[:n-1]
		a.mu.Unlock()
		return b, nil
	}
	a.mu.Unlock()
	mem, err := unix.Mmap(-1, 0, blockMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
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
