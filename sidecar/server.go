package sidecar

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

const (
	headerTime     = 10 * time.Second // to send a request's header
	idleTime       = 2 * time.Minute  // of a client's connection
	maxHeaderIn    = 64 << 10         // the gateway's bound, which comes first
	idleAllowance  = 64               // connections beyond those that have a request
	probeAllowance = 8                // connections of probes
)

// server is an http.Server that ends without cutting anything off, and says when it has.
type server struct {
	http     *http.Server
	listener *limited
	served   chan struct{} // closed when it takes no more connections

	mu     sync.Mutex // guards what follows
	active map[net.Conn]struct{}
	quiet  chan struct{} // closed when active is empty; nil if nobody wants to know
}

// listen begins to serve h on at, over so many connections.
func listen(at netip.AddrPort, connections int, h http.Handler, silence *log.Logger) (*server, error) {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", at, err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s := &server{listener: limit(l, connections), served: make(chan struct{}), active: map[net.Conn]struct{}{}}
	s.http = &http.Server{
		Handler: h, Protocols: protocols, ErrorLog: silence, ConnState: s.watch,
		ReadHeaderTimeout: headerTime, IdleTimeout: idleTime, MaxHeaderBytes: maxHeaderIn,
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: streamBytes, MaxReceiveBufferPerConnection: connectionBytes},
	}
	go func() {
		defer close(s.served)
		_ = s.http.Serve(s.listener) // it ends when it is closed; a listener of TCP ends for no other reason
	}()
	return s, nil
}

func (s *server) address() netip.AddrPort { return s.listener.Addr().(*net.TCPAddr).AddrPort() }

// watch keeps those connections in active that have a request.
func (s *server) watch(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateActive:
		s.active[c] = struct{}{}
	case http.StateIdle, http.StateClosed, http.StateHijacked:
		delete(s.active, c)
	}
	if len(s.active) == 0 && s.quiet != nil {
		close(s.quiet)
		s.quiet = nil
	}
}

// stop takes no more connections and no more requests. It does not wait for those that there are.
func (s *server) stop(ctx context.Context) {
	over, cancel := context.WithCancel(ctx)
	cancel()
	_ = s.http.Shutdown(over) // http.Server's own way to wait counts connections too that have never had a request
	<-s.served
}

// drain waits until every answer has been sent, and closes what is left, after stop.
func (s *server) drain(ctx context.Context) error {
	s.mu.Lock()
	if s.quiet == nil {
		s.quiet = make(chan struct{})
	}
	quiet := s.quiet
	if len(s.active) == 0 {
		close(quiet)
		s.quiet = nil
	}
	s.mu.Unlock()
	select {
	case <-quiet:
		s.close()
		return nil
	case <-ctx.Done():
		return fmt.Errorf("requests are still in flight: %w", ctx.Err())
	}
}

// close cuts off what there is.
func (s *server) close() {
	_ = s.http.Close() // of the listener and connections, which nobody needs any more
	<-s.served
}
