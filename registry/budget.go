package registry

import (
	"context"
	"sync"
	"sync/atomic"
)

// maxBlockBytes is small enough to stay in a core's cache between the socket
// and the consumer, and large enough that handing it over costs nothing.
const maxBlockBytes = 256 << 10

// budget is the memory of all open blobs: a fixed number of tokens, each the
// right to one block, and a pool that reuses the blocks themselves.
type budget struct {
	blockBytes int
	tokens     chan struct{}
	pool       sync.Pool
	inUse      atomic.Int64 // blocks
}

// block is a piece of a blob on its way to the reader. Whoever holds it gives
// it back to the budget exactly once.
type block struct {
	buf   []byte
	n     int           // filled bytes of buf
	owner chan struct{} // where its token came from
}

func newBudget(memory int64, blockBytes int) *budget {
	n := max(int(memory/int64(blockBytes)), 1)
	b := &budget{blockBytes: blockBytes, tokens: newTokens(n)}
	b.pool.New = func() any { return &block{buf: make([]byte, blockBytes)} }
	return b
}

func newTokens(n int) chan struct{} {
	c := make(chan struct{}, n)
	for range n {
		c <- struct{}{}
	}
	return c
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
	b.inUse.Add(1)
	blk := b.pool.Get().(*block)
	blk.n, blk.owner = 0, owner
	return blk
}

// give returns a block; nil is fine.
func (b *budget) give(blk *block) {
	if blk == nil {
		return
	}
	owner := blk.owner
	blk.owner = nil
	b.pool.Put(blk)
	b.inUse.Add(-1)
	owner <- struct{}{} // never blocks: it has room for each token it gave
}

func (b *budget) bytesInUse() int64 { return b.inUse.Load() * int64(b.blockBytes) }
