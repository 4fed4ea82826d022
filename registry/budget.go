package registry

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// maxBlockBytes is small enough to stay in a core's cache between the socket
	// and the consumer, and large enough that handing it over costs nothing.
	maxBlockBytes = 256 << 10
	// maxReserveBytes is the size of a blob's own block. It is used when all else
	// is taken, so it may be slow, but there is one for each blob that is open.
	maxReserveBytes = 32 << 10
)

// budget is the memory of all open blobs: a fixed number of tokens, each the
// right to one block. Blocks are mapped outside of the garbage-collected heap,
// where the collector would let as much garbage stand beside them; they are
// used again as long as a blob is open, and then go back to the system.
type budget struct {
	blockBytes int
	tokens     chan struct{}
	reserves   sync.Pool
	inUse      atomic.Int64 // bytes
	open       atomic.Int64 // blobs

	mu   sync.Mutex // guards free, and that open is 0
	free []*block
}

// block is a piece of a blob on its way to the reader. Whoever holds it gives
// it back to the budget exactly once.
type block struct {
	buf   []byte
	skip  int           // bytes of buf that are handed over already
	n     int           // filled bytes of buf
	owner chan struct{} // where its token came from
}

func newBudget(memory int64, blockBytes int) *budget {
	n := max(int(memory/int64(blockBytes)), 1)
	b := &budget{blockBytes: blockBytes, tokens: newTokens(n)}
	b.reserves.New = func() any { return &block{buf: make([]byte, min(blockBytes, maxReserveBytes))} }
	return b
}

func newTokens(n int) chan struct{} {
	c := make(chan struct{}, n)
	for range n {
		c <- struct{}{}
	}
	return c
}

// share is what one of the blobs that are open now may fetch ahead of its reader.
func (b *budget) share() int64 {
	return int64(cap(b.tokens)) * int64(b.blockBytes) / max(b.open.Load(), 1)
}

// enter counts a blob that is open, and leave one that is not any more and has
// given all of its blocks back.
func (b *budget) enter() { b.open.Add(1) }

func (b *budget) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open.Add(-1) > 0 {
		return
	}
	for _, blk := range b.free {
		_ = unix.Munmap(blk.buf)
	}
	b.free = nil
}

// tryTake returns a shared block if there is one, or else nil.
func (b *budget) tryTake() (*block, error) {
	select {
	case <-b.tokens:
		return b.shared()
	default:
		return nil, nil
	}
}

// take waits for a block: a shared one, or, from when head is closed, also the
// blob's own reserve. A span becomes head while it waits, so both are watched.
func (b *budget) take(ctx context.Context, head <-chan struct{}, reserve chan struct{}) (*block, error) {
	var own chan struct{} // nil until this span is the head
	for {
		select {
		case <-b.tokens:
			return b.shared()
		case <-own:
			return b.lend(b.reserves.Get().(*block), reserve), nil
		case <-head:
			head, own = nil, reserve
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// shared gives out a block for a token that was taken.
func (b *budget) shared() (*block, error) {
	b.mu.Lock()
	var blk *block
	if n := len(b.free); n > 0 {
		blk, b.free = b.free[n-1], b.free[:n-1]
	}
	b.mu.Unlock()
	if blk == nil {
		buf, err := unix.Mmap(-1, 0, b.blockBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			b.tokens <- struct{}{}
			return nil, fmt.Errorf("map memory for a range: %w", err)
		}
		blk = &block{buf: buf}
	}
	return b.lend(blk, b.tokens), nil
}

func (b *budget) lend(blk *block, owner chan struct{}) *block {
	blk.skip, blk.n, blk.owner = 0, 0, owner
	b.inUse.Add(int64(len(blk.buf)))
	return blk
}

// give returns a block; nil is fine.
func (b *budget) give(blk *block) {
	if blk == nil {
		return
	}
	owner := blk.owner
	blk.owner = nil
	b.inUse.Add(-int64(len(blk.buf)))
	if owner == b.tokens {
		b.mu.Lock()
		b.free = append(b.free, blk)
		b.mu.Unlock()
	} else {
		b.reserves.Put(blk)
	}
	owner <- struct{}{} // never blocks: it has room for each token it gave
}

func (b *budget) bytesInUse() int64 { return b.inUse.Load() }
