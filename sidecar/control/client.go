package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Event is what a sidecar tells without being asked.
type Event int

// The events.
const (
	Ready   Event = iota + 1 // the Function accepts connections
	Refused                  // the Function refuses connections
)

// ErrClosed is why a call ends when the connection does.
var ErrClosed = errors.New("the sidecar's connection has ended")

// Client is nodeagent's end. One call at a time is under way; others wait for it. Follow has to run for calls to be answered.
type Client struct {
	conn   net.Conn
	in     reader
	status Status

	call    sync.Mutex    // held over a call: one question at a time
	answers chan *Message // holds one: of the call under way
	ended   chan struct{} // closed when Follow returns
	closed  atomic.Bool   // by this side
}

// NewClient begins a connection: it returns when the sidecar has said how it stands. It closes conn if it fails.
func NewClient(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{conn: conn, in: newReader(conn), answers: make(chan *Message, 1), ended: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	m, err := c.in.next()
	if !stop() {
		return nil, fmt.Errorf("control: wait for the sidecar's first word: %w", ctx.Err())
	}
	if err == nil && (m.Status == nil || m.Status.Protocol != Protocol) {
		err = fmt.Errorf("control: the sidecar does not begin with its status of protocol %d", Protocol)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	c.status = *m.Status
	return c, nil
}

// Status is how the sidecar stood when the connection began.
func (c *Client) Status() Status { return c.status }

// Follow reads what the sidecar says until the connection ends, and returns why: nil after Close. It calls tell for each event,
// with a reason for Refused.
func (c *Client) Follow(tell func(e Event, reason string)) error {
	defer close(c.ended)
	for {
		m, err := c.in.next()
		if c.closed.Load() {
			return nil
		}
		if err == io.EOF {
			return ErrClosed
		}
		if err != nil {
			return err
		}
		switch {
		case m.Ready != nil:
			tell(Ready, "")
		case m.Refused != nil:
			tell(Refused, m.Refused.Error)
		case m.Serving != nil, m.Drained != nil, m.Failed != nil:
			select {
			case c.answers <- m:
			default: // nobody has asked so much
			}
		}
	}
}

// Serve has the sidecar take requests. It returns when it listens.
func (c *Client) Serve(ctx context.Context, s Serve) (Serving, error) {
	m, err := c.ask(ctx, &Message{Serve: &s}, "serve "+s.Function)
	if err != nil {
		return Serving{}, err
	}
	if m.Serving == nil {
		return Serving{}, errors.New("control: serve is not answered by serving")
	}
	return *m.Serving, nil
}

// Drain has the sidecar take no more requests, and returns when those that it has are done.
func (c *Client) Drain(ctx context.Context) error {
	m, err := c.ask(ctx, &Message{Drain: &Empty{}}, "drain")
	if err == nil && m.Drained == nil {
		err = errors.New("control: drain is not answered by drained")
	}
	return err
}

func (c *Client) ask(ctx context.Context, m *Message, what string) (*Message, error) {
	c.call.Lock()
	defer c.call.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("sidecar: %s: %w", what, err)
	}
	select {
	case <-c.answers: // to no question
	default:
	}
	if err := write(c.conn, m); err != nil { // a line fits into the socket's buffer
		return nil, fmt.Errorf("sidecar: %s: %w", what, err)
	}
	select {
	case answer := <-c.answers:
		if answer.Failed != nil {
			return nil, fmt.Errorf("sidecar: %s: %s", what, answer.Failed.Error)
		}
		return answer, nil
	case <-c.ended:
		return nil, fmt.Errorf("sidecar: %s: %w", what, ErrClosed)
	case <-ctx.Done():
		_ = c.Close() // a late answer must not be taken for the next one's
		return nil, fmt.Errorf("sidecar: %s: %w", what, ctx.Err())
	}
}

// Close ends the connection. The sidecar goes on.
func (c *Client) Close() error {
	c.closed.Store(true)
	return c.conn.Close()
}
