package relay_test

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

// server is what a script makes of each connection; n counts them from 1.
type server struct {
	t      testing.TB
	script func(n int, p *peer)
	pipes  bool // in memory, for synctest

	mu      sync.Mutex // guards what follows
	dialed  []net.Conn // the client's ends
	scripts sync.WaitGroup
}

// peer is the server's end of a connection.
type peer struct {
	net.Conn
	in *bufio.Reader
}

// request reads one request and its body; it is nil when the connection has ended.
func (p *peer) request() (*http.Request, string) {
	r, err := http.ReadRequest(p.in)
	if err != nil {
		return nil, ""
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, ""
	}
	return r, string(body)
}

func (p *peer) say(s string) { _, _ = io.WriteString(p.Conn, s) }

// ended waits until the client has closed the connection.
func (p *peer) ended() { _, _ = io.Copy(io.Discard, p.in) }

func (s *server) dial(ctx context.Context) (ours net.Conn, err error) {
	var theirs net.Conn
	if s.pipes {
		ours, theirs = net.Pipe()
	} else {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer func() { _ = l.Close() }()
		if ours, err = new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String()); err != nil {
			return nil, err
		}
		if theirs, err = l.Accept(); err != nil {
			return nil, err
		}
		_ = theirs.SetDeadline(time.Now().Add(patience))
	}
	s.mu.Lock()
	s.dialed = append(s.dialed, ours)
	n := len(s.dialed)
	s.mu.Unlock()
	s.scripts.Go(func() {
		defer func() { _ = theirs.Close() }()
		s.script(n, &peer{theirs, bufio.NewReader(theirs)})
	})
	return ours, nil
}

func (s *server) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.dialed)
}

// awaitClosed waits until the client's end of the n-th connection can see that the other has closed it.
func (s *server) awaitClosed(n int) {
	s.t.Helper()
	s.mu.Lock()
	raw, err := s.dialed[n-1].(*net.TCPConn).SyscallConn()
	s.mu.Unlock()
	if err != nil {
		s.t.Fatal(err)
	}
	for limit := time.Now().Add(patience); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		got, failed := -1, error(nil)
		if err := raw.Control(func(fd uintptr) {
			got, _, failed = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		}); err != nil {
			s.t.Fatal(err)
		}
		if got == 0 && failed == nil {
			return
		}
	}
	s.t.Fatal("in vain: the connection is closed")
}

// start gives a transport to a server that does what script says.
func start(t testing.TB, script func(n int, p *peer)) (*server, *relay.Transport) {
	s := &server{t: t, script: script}
	transport := relay.NewTransport(relay.TransportConfig{Dial: s.dial, MaxIdle: 2})
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		s.scripts.Wait()
	})
	return s, transport
}

func request(t testing.TB, method, body string) *http.Request {
	t.Helper()
	var from io.Reader
	if body != "" {
		from = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, "http://server/path?q", from)
	if err != nil {
		t.Fatal(err)
	}
	r.GetBody = nil // requests that are passed on have none
	return r
}

// ask makes a round trip and reads the answer.
func ask(t *relay.Transport, r *http.Request) (res *http.Response, body string, err error) {
	if res, err = t.RoundTrip(r); err != nil {
		return nil, "", err
	}
	data, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	return res, string(data), err
}
