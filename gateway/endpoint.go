package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/relay"
)

const (
	// trustTime is how long an Instance that an Allocate reply named is believed in against Watch events that leave it out:
	// they may have been made before it served.
	trustTime       = time.Second
	minDownTime     = time.Second
	maxDownTime     = 30 * time.Second
	maxIdleUpstream = 256
	upstreamBytes   = 16 << 10 // what is read at once of an answer
)

// endpoint is one Instance that serves a Function, under one claim: one that was frozen and is thawed comes back under another, and is
// another endpoint. Fields after the blank line are guarded by the function's mutex.
type endpoint struct {
	id, claim string
	address   string
	transport *relay.Transport // with a pool of connections that is this Instance's alone
	known     chan struct{}    // closed when start is set
	dials     dials

	inFlight   int
	draining   bool // gets no new requests
	confirmed  bool // a Watch event has named it
	omitted    bool // the newest Watch event leaves it out
	trustUntil time.Time
	strikes    int
	downs      int
	downUntil  time.Time // no requests until then: it failed
	start      *start    // what an Allocate reply said of its start; nil when a Watch event brought it
}

// start is one activation, as those that waited for it see it.
type start struct {
	begun  time.Time // when Allocate was called
	ended  time.Time
	phases []Phase // offsets from begun
}

// keyOf names an Instance under its claim.
func keyOf(in *hearthv1.Instance) string { return in.GetId() + " " + in.GetClaim().GetId() }

func (e *endpoint) key() string { return e.id + " " + e.claim }

func newEndpoint(in *hearthv1.Instance, c *Config) *endpoint {
	e := &endpoint{id: in.GetId(), claim: in.GetClaim().GetId(), address: in.GetAddress(), known: make(chan struct{})}
	e.transport = relay.NewTransport(relay.TransportConfig{Dial: e.dialer(c), MaxIdle: maxIdleUpstream, BufferBytes: upstreamBytes})
	return e
}

// close lets idle connections go; those in use end with their requests.
func (e *endpoint) close() { e.transport.CloseIdleConnections() }

// dialError says that nothing of a request has been sent, so that it may go elsewhere.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

func (e *dialError) timeout() bool {
	var t net.Error
	return errors.Is(e.err, context.DeadlineExceeded) || errors.As(e.err, &t) && t.Timeout()
}

// dialer connects to the endpoint's Instance.
func (e *endpoint) dialer(c *Config) func(context.Context) (net.Conn, error) {
	dial, patience, address := c.Dial, c.DialTime, e.address
	return func(ctx context.Context) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		defer e.dials.begin(cancel)()
		conn, err := dial(ctx, "tcp", address)
		if err != nil {
			return nil, &dialError{fmt.Errorf("connect to instance %s: %w", e.id, err)}
		}
		return conn, nil
	}
}

// dials are the attempts to connect to an endpoint that are under way.
type dials struct {
	mu      sync.Mutex // guards cancels
	cancels map[*context.CancelFunc]struct{}
}

func (d *dials) begin(cancel context.CancelFunc) (end func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cancels == nil {
		d.cancels = map[*context.CancelFunc]struct{}{}
	}
	d.cancels[&cancel] = struct{}{}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.cancels, &cancel)
	}
}

// abandon ends them, so that their requests go elsewhere now.
func (d *dials) abandon() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for cancel := range d.cancels {
		(*cancel)()
	}
}

// takes says whether the endpoint may get another request now.
func (e *endpoint) takes(now time.Time, concurrency int) bool {
	return e.live(now) && e.inFlight < concurrency
}

// live says whether the endpoint counts as an Instance that is there.
func (e *endpoint) live(now time.Time) bool {
	return !e.draining && !e.distrusted(now) && !now.Before(e.downUntil)
}

func (e *endpoint) distrusted(now time.Time) bool {
	return e.omitted && (e.confirmed || now.After(e.trustUntil))
}

// suspect says whether it was put away, and has not answered since.
func (e *endpoint) suspect() bool { return e.downs > 0 }

// before says whether a request rather goes here than to other.
func (e *endpoint) before(other *endpoint) bool {
	if e.suspect() != other.suspect() {
		return other.suspect()
	}
	return e.inFlight < other.inFlight
}

// explain sets how the endpoint was started, once.
func (e *endpoint) explain(s *start) {
	if e.start == nil && s != nil {
		e.start = s
		close(e.known)
	}
}

func (e *endpoint) answered() {
	e.strikes, e.downs = 0, 0
}
