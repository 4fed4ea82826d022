package registry

import (
	"sync"
	"sync/atomic"
	"time"
)

// stretches add up the time in which at least one of something was going on, and the bytes that came meanwhile. What goes on side by
// side counts once, so the one over the other is a rate. Its methods may be called from anywhere.
type stretches struct {
	came *atomic.Int64 // bytes of everything

	mu    sync.Mutex // guards what follows
	going int
	since time.Time // when the first of them began; valid while going is not 0, as is from
	from  int64     // bytes that had come by then
	time  time.Duration
	total int64
}

func (s *stretches) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.going == 0 {
		s.since, s.from = time.Now(), s.came.Load()
	}
	s.going++
}

func (s *stretches) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.going--; s.going == 0 {
		s.time += time.Since(s.since)
		s.total += s.came.Load() - s.from
	}
}

// until now: the time in seconds, and the bytes.
func (s *stretches) seconds() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.time
	if s.going > 0 {
		sum += time.Since(s.since)
	}
	return sum.Seconds()
}

func (s *stretches) bytes() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.total
	if s.going > 0 {
		sum += s.came.Load() - s.from
	}
	return float64(sum)
}
