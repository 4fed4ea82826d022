package registry

import (
	"context"
	"sync"
	"sync/atomic"
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
// right to one block, and pools that reuse the blocks themselves.
type budget struct {
	blockBytes     int
	tokens         chan struct{}
	pool, reserves sync.Pool
	inUse          atomic.Int64 // bytes
	open           atomic.Int64 // blobs
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
	b.pool.New = func() any { return &block{buf: make([]byte, blockBytes)} }
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

// tryTake returns a shared block if there is one, or else nil.
func (b *budget) tryTake() *block {
	select {
	case <-b.tokens:
		return b.get(b.tokens)
	default:
		return nil
	}
}

// take waits for a block: a shared one, or, from when head is closed, also the
// blob's own reserve. A span becomes head while it waits, so both are watched.
func (b *budget) take(ctx context.Context, head <-chan struct{}, reserve chan struct{}) (*block, error) {
	var own chan struct{} // nil until this span is the head
	for {
		select {
		case <-b.tokens:
			return b.get(b.tokens), nil
		case <-own:
			return b.get(reserve), nil
		case <-head:
			head, own = nil, reserve
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (b *budget) get(owner chan struct{}) *block {
	pool := &b.pool
	if owner != b.tokens {
		pool = &b.reserves
	}
	blk := pool.Get().(*block)
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
		b.pool.Put(blk)
	} else {
		b.reserves.Put(blk)
	}
	owner <- struct{}{} // never blocks: it has room for each token it gave
}

func (b *budget) bytesInUse() int64 { return b.inUse.Load() }
