package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

const (
	dialTime              = 2 * time.Second
	probeFirst, probeMost = 5 * time.Millisecond, 50 * time.Millisecond

	// What a slow client may have held back of an answer over HTTP/2.
	streamBytes, connectionBytes = 64 << 10, 512 << 10
)

// target is the Function's side: where it accepts, and the connections to it.
type target struct {
	candidates []netip.AddrPort
	transport  *relay.Transport
	ready      func()      // called at each connection that it accepts, and
	refused    func(error) // at each that it refuses

	found atomic.Pointer[netip.AddrPort] // that accepted last
}

func newTarget(candidates []netip.AddrPort, concurrency int, ready func(), refused func(error)) *target {
	t := &target{candidates: candidates, ready: ready, refused: refused}
	t.transport = relay.NewTransport(relay.TransportConfig{
		Dial: t.dial, MaxIdle: concurrency,
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: streamBytes, MaxReceiveBufferPerConnection: connectionBytes},
	})
	return t
}

// dial connects to where the Function accepted last, or else to the first place where it does.
func (t *target) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	dialer := net.Dialer{KeepAlive: -1} // it is the same machine
	last := t.found.Load()
	if last != nil {
		if conn, err := dialer.DialContext(ctx, "tcp", last.String()); err == nil {
			return conn, nil
		}
	}
	var err error
	for _, candidate := range t.candidates {
		conn, failed := dialer.DialContext(ctx, "tcp", candidate.String())
		if failed == nil {
			t.ready() // before a request can find it
			t.found.Store(&candidate)
			return conn, nil
		}
		if err = failed; !errors.Is(failed, syscall.ECONNREFUSED) && !errors.Is(failed, syscall.EADDRNOTAVAIL) {
			break
		}
	}
	err = fmt.Errorf("connect to the function: %w", err)
	if last != nil && errors.Is(err, syscall.ECONNREFUSED) {
		t.refused(err)
	}
	return nil, err
}

// await tries to connect until the Function accepts, or a request has found that it does.
func (t *target) await(ctx context.Context) {
	timer := time.NewTimer(probeFirst)
	defer timer.Stop()
	for delay := probeFirst; ; delay = min(delay*3/2, probeMost) {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if t.found.Load() != nil {
			return
		}
		if conn, err := t.dial(ctx); err == nil {
			_ = conn.Close() // it was only asked
			return
		}
		timer.Reset(delay)
	}
}

func (t *target) close() {
	t.transport.CloseIdleConnections()
}
