package instance

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// starts counts the starts that are under way on the node. The cores are theirs: what comes after a start, and need not be done at
// once, waits for a lull. And they have the cores one after another: of twenty that share two cores all are as late as the last one.
type starts struct {
	turns *semaphore.Weighted // in the order in which they were asked for

	mu    sync.Mutex // guards what follows
	under int
	ended time.Time // when the last one did
}

// turnTime is how long a start has its turn at most. One that takes longer waits for something, or keeps a core busy for long: that is no
// reason for others to wait.
const turnTime = 100 * time.Millisecond

// newStarts makes as many turns at once as there are cores, and one more for when one waits.
func newStarts() *starts { return &starts{turns: semaphore.NewWeighted(int64(runtime.NumCPU() + 1))} }

// turn waits for a start's turn, which ends with done, or when its time is over.
func (s *starts) turn(ctx context.Context, t *trace) (done func(), err error) {
	if !s.turns.TryAcquire(1) {
		begin := time.Now()
		if err := s.turns.Acquire(ctx, 1); err != nil {
			return nil, fmt.Errorf("wait while others start: %w", err)
		}
		t.since(phaseTurn, begin)
	}
	release := sync.OnceFunc(func() { s.turns.Release(1) })
	timer := time.AfterFunc(turnTime, release)
	return func() {
		timer.Stop()
		release()
	}, nil
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
