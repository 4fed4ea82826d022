package snapshotter

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"
)

// slots bounds how many jobs work at the same time. A slot that comes free goes to the image that has the fewest, so that a small
// image does not wait for all of a large one; of that image to a layer that starts are known to read, so that it is unpacked, and what
// they read of it in memory, while others still come; and of those to the largest: what takes longest decides when an image is complete. Who works shares the link range by range, as the registry's client has it, so this is what divides that too.
type slots struct {
	mu      sync.Mutex // guards what follows
	free    int
	held    map[string]int // by image; without those that have none
	waiting []*slotWaiter  // in the order of asking
}

type slotWaiter struct {
	image string
	size  int64
	first *atomic.Bool  // it is known to be needed
	ready chan struct{} // closed when the slot is its own
}

func newSlots(n int) *slots { return &slots{free: n, held: map[string]int{}} }

// acquire waits for a slot for a layer of so many bytes, or for the end of ctx. That the layer is needed first may turn out meanwhile.
// The caller owes a release of the same image.
func (s *slots) acquire(ctx context.Context, image string, size int64, first *atomic.Bool) error {
	w := &slotWaiter{image: image, size: size, first: first, ready: make(chan struct{})}
	s.mu.Lock()
	s.waiting = append(s.waiting, w)
	s.grant()
	s.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.waiting, w); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
	} else {
		s.giveBack(image) // granted meanwhile
	}
	return context.Cause(ctx)
}

func (s *slots) release(image string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giveBack(image)
}

// giveBack frees a slot of an image. s.mu is held.
func (s *slots) giveBack(image string) {
	s.free++
	if s.held[image]--; s.held[image] == 0 {
		delete(s.held, image)
	}
	s.grant()
}

// grant hands free slots out. s.mu is held.
func (s *slots) grant() {
	for s.free > 0 && len(s.waiting) > 0 {
		next := slices.MinFunc(s.waiting, func(a, b *slotWaiter) int {
			return cmp.Or(cmp.Compare(s.held[a.image], s.held[b.image]), a.later()-b.later(), cmp.Compare(b.size, a.size))
		})
		s.waiting = slices.DeleteFunc(s.waiting, func(w *slotWaiter) bool { return w == next })
		s.free--
		s.held[next.image]++
		close(next.ready)
	}
}

// later is 1 for what can wait, and 0 for what is known to be needed first.
func (w *slotWaiter) later() int {
	if w.first.Load() {
		return 0
	}
	return 1
}
