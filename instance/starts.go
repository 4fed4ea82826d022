package instance

import (
	"context"
	"sync"
	"time"
)

// starts counts the starts that are under way on the node. The cores are theirs: what comes after a start, and need not be done at
// once, waits for a lull.
type starts struct {
	mu    sync.Mutex // guards what follows
	under int
	ended time.Time // when the last one did
}

// lullPatience bounds the wait for a lull, which may never come.
const lullPatience = time.Second

func (s *starts) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.under++
}

func (s *starts) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.under--
	s.ended = time.Now()
}

// left is how much longer there may be no start for it to be a lull of that length.
func (s *starts) left(quiet time.Duration) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.under > 0 {
		return quiet
	}
	return quiet - time.Since(s.ended)
}

// lull waits until no start has been under way for a while, or patience is at its end. It is false if ctx ended first.
func (s *starts) lull(ctx context.Context, quiet time.Duration) bool {
	for end := time.Now().Add(lullPatience); ; {
		wait := min(s.left(quiet), time.Until(end))
		if wait <= 0 {
			return true
		}
		if !sleep(ctx, wait) {
			return false
		}
	}
}
