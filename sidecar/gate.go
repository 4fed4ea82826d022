package sidecar

import (
	"context"
	"errors"
	"sync"
)

var errFull = errors.New("the queue is full")

// gate lets so many requests through at once, and so many wait, first come, first served.
type gate struct {
	slots chan struct{} // one is in it for each that is through
	queue int
	idle  func() // called when the last has left

	mu      sync.Mutex // guards what follows
	inside  int        // through or waiting
	waiting int
	empty   chan struct{} // closed when nobody is inside; nil if nobody wants to know
}

func newGate(concurrency, queue int, idle func()) *gate {
	return &gate{slots: make(chan struct{}, concurrency), queue: queue, idle: idle}
}

// enter returns when it is the caller's turn, who then has to leave, or with why it never is.
func (g *gate) enter(ctx context.Context) error {
	g.mu.Lock()
	g.inside++
	through := false
	select {
	case g.slots <- struct{}{}:
		through = true
	default:
	}
	full := !through && g.waiting >= g.queue
	if !through && !full {
		g.waiting++
	}
	g.mu.Unlock()
	switch {
	case through:
		return nil
	case full:
		g.left()
		return errFull
	}
	var err error
	select {
	case g.slots <- struct{}{}:
	case <-ctx.Done():
		err = ctx.Err()
	}
	g.mu.Lock()
	g.waiting--
	g.mu.Unlock()
	if err != nil {
		g.left()
	}
	return err
}

// leave gives the turn to the next.
func (g *gate) leave() {
	<-g.slots
	g.left()
}

func (g *gate) left() {
	g.mu.Lock()
	g.inside--
	last := g.inside == 0
	if last && g.empty != nil {
		close(g.empty)
		g.empty = nil
	}
	g.mu.Unlock()
	if last {
		g.idle()
	}
}

func (g *gate) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.inside
}

// emptied is closed when nobody is inside.
func (g *gate) emptied() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if g.empty == nil {
		g.empty = make(chan struct{})
	}
	return g.empty
}
