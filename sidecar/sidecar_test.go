package sidecar_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/sidecar/control"
)

func timed(t testing.TB) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx, cancel
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout() || errors.Is(err, os.ErrDeadlineExceeded)
}

// held is a Function whose requests stay until they are let go.
type held struct {
	in  chan struct{} // one for each that comes
	out chan struct{} // one lets one go
	now atomic.Int64
	max atomic.Int64
}

func newHeld() *held { return &held{in: make(chan struct{}, 1000), out: make(chan struct{}, 1000)} }

func (h *held) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := h.now.Add(1)
	defer h.now.Add(-1)
	for m := h.max.Load(); n > m && !h.max.CompareAndSwap(m, n); m = h.max.Load() {
	}
	h.in <- struct{}{}
	select {
	case <-h.out:
	case <-r.Context().Done():
	}
}

// Two are in the Function, three wait, the sixth is refused; all others are answered, and never more than two at once.
func TestConcurrencyAndQueue(t *testing.T) {
	w, h := newWorld(t), newHeld()
	at, _ := w.serve(h, func(s *control.Serve) { s.Concurrency, s.Queue = 2, 3 })
	c := client(t, false)
	answers := make(chan answer, 6)
	for range 6 {
		go func() { answers <- get(c, "http://"+at) }()
	}
	no := <-answers // nothing else can be answered yet
	if got := no.code(t); got != "503 queue_full" || no.header.Get("Retry-After") != "1" {
		t.Errorf("%s, %v", got, no.header)
	}
	<-h.in
	for i := range 5 {
		if i < 4 {
			<-h.in // two are in it, as long as there are two
		}
		h.out <- struct{}{}
		if a := <-answers; a.err != nil || a.status != 200 {
			t.Errorf("%d %q %v", a.status, a.body, a.err)
		}
	}
	if n := h.max.Load(); n != 2 {
		t.Errorf("%d at once", n)
	}
}

// A client that leaves the queue makes room, and its request never comes to the Function.
func TestLeavingTheQueue(t *testing.T) {
	w, h := newWorld(t), newHeld()
	at, _ := w.serve(h, func(s *control.Serve) { s.Concurrency, s.Queue = 1, 1 })
	c := client(t, false)
	answers := make(chan answer, 2)
	go func() { answers <- get(c, "http://"+at+"/first") }()
	<-h.in
	ctx, cancel := timed(t)
	left := make(chan answer, 1)
	go func() {
		left <- do(c, must(http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at+"/left", nil)))
	}()
	eventually(t, "one waits", func() bool { return w.inFlight() == 2 })
	cancel()
	<-left
	eventually(t, "it has left", func() bool { return w.inFlight() == 1 })
	go func() { answers <- get(c, "http://"+at+"/second") }()
	h.out <- struct{}{}
	<-h.in
	h.out <- struct{}{}
	for range 2 {
		if a := <-answers; a.status != 200 {
			t.Errorf("%d %q %v", a.status, a.body, a.err)
		}
	}
	if len(h.in) > 0 {
		t.Error("the one that left came to the function")
	}
}

// inFlight asks as a nodeagent does that has just started.
func (w *world) inFlight() int {
	w.hangUp()
	w.connect()
	return w.agent.Status().InFlight
}

// A Function that was frozen may close connections that were idle for too long, just as a request goes out on one: those from before
// a serve that is said again are not used any more.
func TestServeAgain(t *testing.T) {
	for name, h2 := range map[string]bool{"http1": false, "grpc": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			from := make(chan string, 1)
			h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { from <- r.RemoteAddr })
			s := control.Serve{}
			at, _ := w.serve(h, func(q *control.Serve) { s = *q })
			c := client(t, h2)
			post := func() string {
				t.Helper()
				r := must(http.NewRequest(http.MethodPost, "http://"+at, http.NoBody))
				if h2 {
					r.Header.Set("Content-Type", "application/grpc")
				}
				if a := do(c, r); a.status != 200 {
					t.Fatalf("%d %v", a.status, a.err)
				}
				return <-from
			}
			last := post()
			eventually(t, "another connection", func() bool { // an HTTP/2 stream ends a moment after its answer
				if again := w.ask(s); again.Listen.String() != at {
					t.Errorf("it moved from %s to %s", at, again.Listen)
				}
				former := last
				last = post()
				return last != former
			})
		})
	}
}

// A drain takes no more connections, lets what is in flight finish, and then says so; another serve takes up again.
func TestDrain(t *testing.T) {
	w, h := newWorld(t), newHeld()
	s := control.Serve{}
	at, _ := w.serve(h, func(q *control.Serve) { s = *q })
	c := client(t, false)
	answers := make(chan answer, 1)
	go func() { answers <- do(c, must(http.NewRequest(http.MethodPost, "http://"+at, strings.NewReader("x")))) }()
	<-h.in
	idle := must(net.Dial("tcp", at)) // has never said anything
	defer func() { _ = idle.Close() }()
	ctx, _ := timed(t)
	drained := make(chan error, 1)
	agent := w.agent
	go func() { drained <- agent.Drain(ctx) }()
	eventually(t, "connections are refused", func() bool {
		conn, err := net.Dial("tcp", at)
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
	select {
	case err := <-drained:
		t.Fatalf("drained with a request in flight: %v", err)
	default:
	}
	h.out <- struct{}{}
	if a := <-answers; a.status != 200 || a.err != nil {
		t.Errorf("%d %q %v", a.status, a.body, a.err)
	}
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	w.hangUp()
	w.connect()
	if st := w.agent.Status(); st.Serving || st.Function != "hello-00001" || st.InFlight != 0 {
		t.Errorf("%+v", st)
	}
	again := w.ask(s)
	h.out <- struct{}{}
	if a := get(c, "http://"+again.Listen.String()); a.status != 200 {
		t.Errorf("after another serve: %d %q %v", a.status, a.body, a.err)
	}
}

// A drain that is given up goes on with what is in flight, and may be asked for again.
func TestDrainGivenUp(t *testing.T) {
	w, h := newWorld(t), newHeld()
	at, _ := w.serve(h, nil)
	answers := make(chan answer, 1)
	go func() { answers <- get(client(t, false), "http://"+at) }()
	<-h.in
	ctx, cancel := timed(t)
	cancel()
	if err := w.agent.Drain(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	ctx, cancel = timed(t)
	drained := make(chan error, 1)
	agent := w.agent
	go func() { drained <- agent.Drain(ctx) }()
	eventually(t, "connections are refused", func() bool {
		conn, err := net.Dial("tcp", at)
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
	cancel()
	if err := <-drained; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	h.out <- struct{}{}
	if a := <-answers; a.status != 200 {
		t.Errorf("%d %v", a.status, a.err)
	}
	w.hangUp()
	w.connect()
	ctx, _ = timed(t)
	if err := w.agent.Drain(ctx); err != nil {
		t.Error(err)
	}
}

// reserve takes a port of loopback at which connections are refused until listen is called.
func reserve(t *testing.T) (address string, listen func() net.Listener) {
	t.Helper()
	fd := must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	file := os.NewFile(uintptr(fd), "reserved")
	t.Cleanup(func() { _ = file.Close() })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	port := must(unix.Getsockname(fd)).(*unix.SockaddrInet4).Port
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port)).String(), func() net.Listener {
		if err := unix.Listen(fd, 10); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = file.Close() }() // the listener has a copy
		return must(net.FileListener(file))
	}
}

// Ready and refused are told; a Function may listen anywhere among the targets, and late.
func TestEvents(t *testing.T) {
	w := newWorld(t)
	address, listen := reserve(t)
	nowhere := netip.MustParseAddrPort("127.0.0.1:1")
	s := question(address)
	s.Targets = append([]netip.AddrPort{nowhere}, s.Targets...)
	at := w.ask(s)
	c := client(t, false)
	if a := get(c, "http://"+at.Probe.String()+"/healthz"); a.status != 200 {
		t.Errorf("healthz: %d %v", a.status, a.err)
	}
	if a := get(c, "http://"+at.Probe.String()+"/readyz"); a.status != 503 {
		t.Errorf("readyz of one that does not listen: %d %v", a.status, a.err)
	}
	if a := get(c, "http://"+at.Listen.String()); a.err == nil {
		t.Errorf("a request to one that does not listen: %d %q", a.status, a.body)
	}
	f := listen()
	server := &http.Server{Handler: http.NotFoundHandler()}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(f) })
	w.hear(control.Ready)
	if a := get(c, "http://"+at.Probe.String()+"/readyz"); a.status != 200 {
		t.Errorf("readyz: %d %v", a.status, a.err)
	}
	if a := get(c, "http://"+at.Listen.String()); a.status != 404 {
		t.Errorf("%d %v", a.status, a.err)
	}
	_ = server.Close()
	serving.Wait()
	if a := get(c, "http://"+at.Listen.String()); a.err == nil {
		t.Errorf("a request to one that has gone: %d %q", a.status, a.body)
	}
	if e := w.hear(control.Refused); !strings.Contains(e.reason, "refused") {
		t.Errorf("reason %q", e.reason)
	}
}

// A sidecar is one Function's for ever, whoever asks.
func TestServesOneFunction(t *testing.T) {
	w := newWorld(t)
	if st := w.agent.Status(); st.Function != "" || st.Serving {
		t.Errorf("a new one: %+v", st)
	}
	at, _ := w.serve(http.NotFoundHandler(), nil)
	other := question("127.0.0.1:9")
	ctx, _ := timed(t)
	if _, err := w.agent.Serve(ctx, other); err == nil || !strings.Contains(err.Error(), "hello-00001") {
		t.Errorf("another target: %v", err)
	}
	first := w.agent
	w.hangUp()
	w.connect()
	if st := w.agent.Status(); st.Function != "hello-00001" || !st.Serving {
		t.Errorf("after a restart of nodeagent: %+v", st)
	}
	if _, err := w.agent.Serve(ctx, other); err == nil {
		t.Error("another target after a restart of nodeagent is taken")
	}
	if _, err := first.Serve(ctx, other); !errors.Is(err, control.ErrClosed) && !errors.Is(err, net.ErrClosed) {
		t.Errorf("the former connection: %v", err)
	}
	if a := get(client(t, false), "http://"+at); a.status != 404 {
		t.Errorf("%d %v", a.status, a.err)
	}
}

// What the address is taken by is said.
func TestAddressTaken(t *testing.T) {
	w := newWorld(t)
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer func() { _ = l.Close() }()
	s := question("127.0.0.1:9")
	s.Listen = netip.MustParseAddrPort(l.Addr().String())
	ctx, _ := timed(t)
	if _, err := w.agent.Serve(ctx, s); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Error(err)
	}
	s.Listen = netip.MustParseAddrPort("127.0.0.1:0")
	if _, err := w.agent.Serve(ctx, s); err != nil {
		t.Errorf("after that: %v", err)
	}
}
