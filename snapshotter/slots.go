package snapshotter

import (
	"context"
	"sync"
)

// slots bounds how many jobs work at the same time. The largest that waits goes first: what takes longest decides when an image
// is complete.
type slots struct {
	mu      sync.Mutex // guards free and waiting
	free    int
	waiting []*slotWaiter
}

type slotWaiter struct {
	size  int64
	ready chan struct{} // closed when the slot is its own
}

// acquire waits for a slot, or for the end of ctx.
func (s *slots) acquire(ctx context.Context, size int64) error {
	w := &slotWaiter{size: size, ready: make(chan struct{})}
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
	for i, other := range s.waiting {
		if other == w {
			s.waiting = append(s.waiting[:i], s.waiting[i+1:]...)
			return context.Cause(ctx)
		}
	}
	s.free++ // granted meanwhile
	s.grant()
	return context.Cause(ctx)
}

func (s *slots) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free++
	s.grant()
}

// grant hands free slots out. s.mu is held.
func (s *slots) grant() {
	for s.free > 0 && len(s.waiting) > 0 {
		largest := 0
		for i, w := range s.waiting {
			if w.size > s.waiting[largest].size {
				largest = i
			}
		}
		w := s.waiting[largest]
		s.waiting = append(s.waiting[:largest], s.waiting[largest+1:]...)
		s.free--
		close(w.ready)
	}
}
