package gateway_test

import (
	"context"
	"fmt"
	"net"
	"sync"
	"syscall"
	"testing"
)

// network is where gateway, clients and instances meet: loopback, or pipes in memory for tests in which time matters.
type network interface {
	listen() net.Listener
	dial(ctx context.Context, network, address string) (net.Conn, error)
}

type loopback struct{ t testing.TB }

func (n loopback) listen() net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	return l
}

func (loopback) dial(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, network, address)
}

type pipes struct {
	mu        sync.Mutex
	listeners map[string]*pipeListener
}

func newPipes() *pipes { return &pipes{listeners: map[string]*pipeListener{}} }

type pipeListener struct {
	pipes *pipes
	addr  pipeAddr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

type pipeAddr string

func (pipeAddr) Network() string  { return "pipe" }
func (a pipeAddr) String() string { return string(a) }

func (n *pipes) listen() net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := &pipeListener{pipes: n, addr: pipeAddr(fmt.Sprintf("pipe-%d:80", len(n.listeners))), conns: make(chan net.Conn), done: make(chan struct{})}
	n.listeners[l.addr.String()] = l
	return l
}

// hide makes connections to an address be refused, until its listener is shown again.
func (n *pipes) hide(address string) *pipeListener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.listeners[address]
	closed := &pipeListener{pipes: n, addr: l.addr, conns: make(chan net.Conn), done: make(chan struct{})}
	close(closed.done)
	n.listeners[address] = closed
	return l
}

func (n *pipes) show(address string, l *pipeListener) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[address] = l
}

func (n *pipes) dial(ctx context.Context, _, address string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[address]
	n.mu.Unlock()
	if l == nil {
		<-ctx.Done() // nobody answers
		return nil, ctx.Err()
	}
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.done:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return l.addr }
