package registry

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// minAvoid is how long a host that cannot be reached is left out while there is another; it doubles each time that it still
	// cannot, up to maxAvoid.
	minAvoid = 30 * time.Second
	maxAvoid = 10 * time.Minute
)

// host is what is known of one server, whatever registry names and repositories lead to it.
type host struct {
	*pacer
	ranges atomic.Bool // it has answered a range with 206 before
	down   atomic.Bool // until is set: spares those who get answers the lock

	mu    sync.Mutex // guards what follows
	until time.Time  // leave it out until then
	avoid time.Duration
}

// failed is told that the host could not be reached, or brought nothing as often as it was asked.
func (h *host) failed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if now.Before(h.until) {
		return // the same failure, seen by others too
	}
	h.leaveOut(now)
}

func (h *host) leaveOut(now time.Time) {
	h.avoid = min(max(2*h.avoid, minAvoid), maxAvoid)
	h.until = now.Add(h.avoid)
	h.down.Store(true)
}

// alive is told of each answer.
func (h *host) alive() {
	if !h.down.Load() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.until, h.avoid = time.Time{}, 0
	h.down.Store(false)
}

// skip says whether to go on to the next host at once. When the time to leave this one out is over, one caller is let through to
// see how it is, and pays for it if it is still dead; the others go on leaving it out until that one knows.
func (h *host) skip() bool {
	if h.closed() {
		return true
	}
	if !h.down.Load() {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if now.Before(h.until) {
		return true
	}
	h.leaveOut(now)
	return false
}

// unreachable says whether err is the host's failure to be there, rather than its answer or what became of it.
func unreachable(err error) bool {
	var se *StatusError
	if errors.As(err, &se) {
		return se.Code >= http.StatusInternalServerError && !se.redirected
	}
	for _, answer := range []error{ErrSize, ErrProtocol, ErrDigest, ErrUnauthorized} {
		if errors.Is(err, answer) {
			return false
		}
	}
	return true
}

// dialError is matched by what keeps a connection from being made.
type dialError struct {
	error
	took time.Duration // to find out
}

// Unwrap implements errors.Unwrap.
func (e *dialError) Unwrap() error { return e.error }

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// marked makes the errors of dial known as such.
func marked(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		start := time.Now()
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, &dialError{err, time.Since(start)}
		}
		return c, nil
	}
}
