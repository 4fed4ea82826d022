package layer

import (
	"context"
	"fmt"

	"github.com/klauspost/compress/zstd"
)

const (
	// decoderBytes is what a decoder of zstd takes beside its window: the input, the literals and the output of one block, and tables.
	decoderBytes = 1 << 20
	// wideLoan are the blocks that pay for a window of 32 MiB. Encoders of images use none that is wider; `zstd --long` does.
	wideLoan = (32<<20 + decoderBytes + blockMemory - 1) / blockMemory
)

// enoughBytes is what four layers at once take, a window of 32 MiB beside them, and the decoders of many cores.
const enoughBytes = 56 << 20

// Share divides a node's memory for layers in flight: unpack is a Config's MemoryBytes, fetch is for what is fetched ahead, and what is
// left for names and for what is not counted. A small node halves it; where there is enough for unpacking, the rest keeps the link busy.
func Share(memory int64) (unpack, fetch int64) {
	unpack = min(memory/2, max(enoughBytes, memory*3/8))
	return unpack, memory - unpack - unpack/4 - memory/12
}

// loan is memory for the decoder of a large frame, which lies in the garbage-collected heap: it is paid for with blocks of the
// arena, which are not mapped meanwhile.
//
// Nobody deadlocks. Who waits for a loan holds what a layer is sure of and nothing that it borrowed (see quota.returned). Seats are
// so few that what all layers are sure of, and one loan, fit side by side. Who has a loan waits for nothing but the blocks that it
// is sure of, so it comes to its end, and the next gets it.
type loan struct {
	blocks int
	zstd   *zstd.Decoder // nil if there is none yet, or the frame is LZ4's
}

// lend waits for a loan, or gives one whose decoder is there already. It is ErrTooLarge if there never is so much.
func (a *arena) lend(ctx context.Context, bytes uint64) (*loan, error) {
	if most := uint64(a.most) * blockMemory; bytes > most {
		return nil, fmt.Errorf("%w: a frame takes %d MiB, and %d are the most: a larger --memory-budget would help", ErrTooLarge, bytes>>20, most>>20)
	}
	n := int((bytes + blockMemory - 1) / blockMemory)
	if err := enter(ctx, a.borrow); err != nil {
		return nil, err
	}
	defer func() { a.borrow <- struct{}{} }()
	if l := a.again(n); l != nil {
		return l, nil
	}
	if err := a.collect(ctx, n); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unmap(len(a.free) - (a.mapped + a.lent + n - a.total))
	a.count(n)
	return &loan{blocks: n}, nil
}

// count keeps lent, and tells of it. The caller holds mu.
func (a *arena) count(n int) {
	a.lent += n
	a.lentBytes(int64(a.lent) * blockMemory)
}

// again takes the idle loan that fits best, unless it is far too large.
func (a *arena) again(n int) *loan {
	a.mu.Lock()
	defer a.mu.Unlock()
	best := -1
	for i, l := range a.idle {
		if l.blocks >= n && l.blocks <= 2*n && (best < 0 || l.blocks < a.idle[best].blocks) {
			best = i
		}
	}
	if best < 0 {
		return nil
	}
	l := a.idle[best]
	a.idle[best] = a.idle[len(a.idle)-1]
	a.idle = a.idle[:len(a.idle)-1]
	return l
}

// repay takes a loan back. Its decoder is kept for the next, as long as nobody is short of memory.
func (a *arena) repay(l *loan) {
	a.mu.Lock()
	a.idle = append(a.idle, l)
	a.mu.Unlock()
	if l.zstd == nil || a.short.Load() > 0 {
		a.dropIdle()
	}
}

// dropIdle gives up the decoders that nobody uses.
func (a *arena) dropIdle() {
	a.mu.Lock()
	n := 0
	for _, l := range a.idle {
		n += l.blocks
		if l.zstd != nil {
			l.zstd.Close()
		}
	}
	a.idle = nil
	if n > 0 {
		a.count(-n)
	}
	a.mu.Unlock()
	for range n {
		a.tokens <- struct{}{}
	}
}
