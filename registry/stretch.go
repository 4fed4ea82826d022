package registry

import (
	"sync"
	"time"
)

// stretches add up the time in which at least one of something was going on. What goes on side by side counts once, so bytes over it
// are a rate. Its methods may be called from anywhere.
type stretches struct {
	mu    sync.Mutex // guards what follows
	going int
	since time.Time // when the first of them began; valid while going is not 0
	sum   time.Duration
}

func (s *stretches) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.going == 0 {
		s.since = time.Now()
	}
	s.going++
}

func (s *stretches) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.going--; s.going == 0 {
		s.sum += time.Since(s.since)
	}
}

// seconds until now.
func (s *stretches) seconds() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.sum
	if s.going > 0 {
		sum += time.Since(s.since)
	}
	return sum.Seconds()
}
