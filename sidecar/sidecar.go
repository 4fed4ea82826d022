package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hearth-serverless/hearth/sidecar/control"
)

// restTime is how long no request has been there when memory is given back.
const restTime = time.Second

// Sidecar is one Function's. It implements control.Sidecar.
type Sidecar struct {
	silence *log.Logger // net/http would fill a log with what anyone sends

	told chan struct{} // closed when what is
	rest *time.Timer   // gives memory back

	mu      sync.Mutex     // guards what follows
	what    *control.Serve // it and the next three never change once they are set
	gate    *gate
	target  *target
	proxy   *proxy
	server  *server // nil while no requests are taken
	probes  *server
	ready   bool
	session *control.Session
}

// New makes a sidecar that is nobody's yet.
func New() *Sidecar {
	s := &Sidecar{silence: log.New(io.Discard, "", 0), told: make(chan struct{}), rest: time.AfterFunc(restTime, debug.FreeOSMemory)}
	s.rest.Stop() // until there has been a request
	return s
}

// Run listens for nodeagent on a Unix socket until ctx is done, and then ends without waiting for requests. A new connection
// takes the place of the one before, which is nodeagent's former one. A socket of that name is replaced.
func (s *Sidecar) Run(ctx context.Context, socket string) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("sidecar: %w", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("sidecar: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	var work sync.WaitGroup
	work.Go(func() { s.awaitFunction(ctx) })
	defer s.close()
	defer work.Wait()
	defer cancel()
	for end := func() {}; ; {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("sidecar: %w", errors.Join(err, l.Close()))
		}
		end()
		end = s.begin(ctx, conn, &work)
	}
}

// awaitFunction waits until it is known which, and then until it accepts.
func (s *Sidecar) awaitFunction(ctx context.Context) {
	select {
	case <-s.told:
		s.target.await(ctx)
	case <-ctx.Done():
	}
}

// begin begins the session of a connection, and returns what ends it.
func (s *Sidecar) begin(ctx context.Context, conn net.Conn, work *sync.WaitGroup) (end func()) {
	ctx, end = context.WithCancel(ctx)
	session := control.NewSession(conn)
	s.mu.Lock()
	s.session = session // in the order of connections, and before its status is taken, so that nothing is missed
	status := s.status()
	s.mu.Unlock()
	work.Go(func() {
		defer end()
		session.Run(ctx, status, s)
	})
	return end
}

// status is how it stands; mu must be held.
func (s *Sidecar) status() control.Status {
	if s.what == nil {
		return control.Status{}
	}
	return control.Status{Function: s.what.Function, Serving: s.server != nil, Ready: s.ready, InFlight: s.gate.count()}
}

// Serve implements control.Sidecar.
func (s *Sidecar) Serve(what *control.Serve) (control.Serving, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.what != nil && !s.what.Equal(what) {
		return control.Serving{}, fmt.Errorf("it is the sidecar of %s and of no other", s.what.Function)
	}
	if s.what != nil {
		s.target.close() // a Function that was frozen closes what was idle for too long, perhaps just as a request goes out on it
	}
	if s.server == nil {
		if err := s.listen(what); err != nil {
			return control.Serving{}, err
		}
	}
	at := control.Serving{Listen: s.server.address()}
	if s.probes != nil {
		at.Probe = s.probes.address()
	}
	return at, nil
}

// listen takes requests and probes; mu must be held.
func (s *Sidecar) listen(what *control.Serve) error {
	if s.what == nil {
		s.gate = newGate(what.Concurrency, what.Queue, func() { s.rest.Reset(restTime) })
		s.target = newTarget(what.Targets, what.Concurrency, s.accepts, func(err error) { s.tell(control.Refused, err.Error()) })
		s.proxy = newProxy(what, s.gate, s.target, s.silence)
	}
	server, err := listen(what.Listen, what.Concurrency+what.Queue+idleAllowance, s.proxy, s.silence)
	if err != nil {
		return err
	}
	if s.probes == nil && what.Probe.IsValid() {
		if s.probes, err = listen(what.Probe, probeAllowance, http.HandlerFunc(s.probe), s.silence); err != nil {
			server.close()
			return err
		}
	}
	s.server = server
	if s.what == nil {
		s.what = what
		close(s.told)
	}
	return nil
}

// accepts notes that the Function does.
func (s *Sidecar) accepts() {
	s.mu.Lock()
	was := s.ready
	s.ready = true
	s.mu.Unlock()
	if !was {
		s.tell(control.Ready, "")
	}
}

func (s *Sidecar) tell(e control.Event, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session != nil {
		s.session.Tell(e, reason)
	}
}

// Drain implements control.Sidecar.
func (s *Sidecar) Drain(ctx context.Context) error {
	s.mu.Lock()
	server, gate, target := s.server, s.gate, s.target
	s.server = nil
	s.mu.Unlock()
	if gate == nil {
		return nil
	}
	if server != nil {
		server.stop(ctx)
		if err := server.drain(ctx); err != nil {
			return err
		}
	}
	select {
	case <-gate.emptied(): // connections that were taken over are in it too
	case <-ctx.Done():
		return fmt.Errorf("requests are still in flight: %w", ctx.Err())
	}
	target.close()
	return nil
}

// probe answers those who ask how it is, on an address of their own: the Function may have the same paths.
func (s *Sidecar) probe(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	ready := s.ready && s.server != nil
	s.mu.Unlock()
	switch {
	case r.URL.Path == "/healthz", r.URL.Path == "/readyz" && ready:
		_, _ = io.WriteString(w, "ok\n") // whoever asked may have left
	case r.URL.Path == "/readyz":
		http.Error(w, "not ready", http.StatusServiceUnavailable)
	default:
		http.NotFound(w, r)
	}
}

// close ends everything at once.
func (s *Sidecar) close() {
	s.rest.Stop()
	s.mu.Lock()
	servers := []*server{s.server, s.probes}
	s.mu.Unlock()
	for _, server := range servers {
		if server != nil {
			server.close()
		}
	}
}
