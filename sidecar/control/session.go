package control

import (
	"context"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// eventInterval bounds how often events are told.
	eventInterval = 50 * time.Millisecond
	// writeTime is how long nodeagent may leave a line unread.
	writeTime = 5 * time.Second
	// maxReasonBytes bounds what is said of a failure.
	maxReasonBytes = 2 << 10
)

// Sidecar is what a session's questions are put to.
type Sidecar interface {
	// Serve takes requests from now on. Saying the same again is no error, another Function is.
	Serve(s *Serve) (Serving, error)
	// Drain takes no more requests, and returns when those that there are are done, or ctx is.
	Drain(ctx context.Context) error
}

// Session is the sidecar's end of a connection. Tell may be called before Run and at any time.
type Session struct {
	conn net.Conn
	wake chan struct{} // holds one: there is something to tell

	mu      sync.Mutex // guards what follows
	pending [Refused + 1]bool
	reason  string // of Refused
}

// NewSession makes the session of a connection, which Run closes.
func NewSession(conn net.Conn) *Session { return &Session{conn: conn, wake: make(chan struct{}, 1)} }

// Tell has an event told soon. It never waits. Events of one kind that come together are told once.
func (s *Session) Tell(e Event, reason string) {
	s.mu.Lock()
	s.pending[e] = true
	if e == Refused {
		s.reason = reason
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run says status, answers questions one after the other, and tells events, until the connection or ctx ends.
func (s *Session) Run(ctx context.Context, status Status, to Sidecar) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = s.conn.Close() })() // Close below is earlier in any other case
	defer s.conn.Close()
	status.Protocol = Protocol
	if s.say(&Message{Status: &status}) != nil {
		return
	}
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	questions := make(chan *Message)
	work.Go(func() { s.tell(ctx, cancel) })
	work.Go(func() {
		defer cancel()
		s.read(ctx, questions)
	})
	for {
		select {
		case m := <-questions:
			if s.say(answer(ctx, m, to)) != nil {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// read passes questions on until the connection ends or says what makes no sense.
func (s *Session) read(ctx context.Context, questions chan<- *Message) {
	for in := newReader(s.conn); ; {
		m, err := in.next()
		if err != nil {
			if err != io.EOF {
				_ = s.say(failed(err)) // the other side may have gone
			}
			return
		}
		select {
		case questions <- m:
		case <-ctx.Done():
			return
		}
	}
}

func answer(ctx context.Context, m *Message, to Sidecar) *Message {
	switch {
	case m.Serve != nil:
		at, err := to.Serve(m.Serve)
		if err != nil {
			return failed(err)
		}
		return &Message{Serving: &at}
	case m.Drain != nil:
		if err := to.Drain(ctx); err != nil {
			return failed(err)
		}
		return &Message{Drained: &Empty{}}
	}
	return &Message{Failed: &Failure{Error: "that is no question"}}
}

func failed(err error) *Message { return &Message{Failed: &Failure{Error: clip(err.Error())}} }

func clip(s string) string { return s[:min(len(s), maxReasonBytes)] }

// tell sends events, the first at once and others when the interval is over.
func (s *Session) tell(ctx context.Context, cancel func()) {
	defer cancel()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-s.wake:
		case <-ctx.Done():
			return
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			return
		}
		s.mu.Lock()
		pending, reason := s.pending, s.reason
		s.pending = [len(s.pending)]bool{}
		s.mu.Unlock()
		for e, m := range map[Event]*Message{
			Ready: {Ready: &Empty{}}, Refused: {Refused: &Failure{Error: clip(reason)}},
		} {
			if pending[e] && s.say(m) != nil {
				return
			}
		}
		pause.Reset(eventInterval)
	}
}

// say is called by several goroutines: a line is one write, and writes of a connection do not mix.
func (s *Session) say(m *Message) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
		return err
	}
	return write(s.conn, m)
}
