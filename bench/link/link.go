// Package link makes loopback as slow as the network that a benchmark is about: a TCP proxy before a registry, which limits what
// comes back from it in all and on each connection, and delays both directions. Token buckets hold the rates; nothing is lost
// or reordered.
package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Speed is what a link can do, counted in bytes of TCP's payload. Zero is no limit.
type Speed struct {
	BytesPerSecond           int
	ConnectionBytesPerSecond int
	RoundTrip                time.Duration
}

const (
	// chunk is read and written at once.
	chunk = 64 << 10
	// lateness is what a bucket holds the bytes of: a timer that is late by less, as on a busy machine many are, costs a link nothing
	// of its rate, and a link is no faster than it says for longer.
	lateness = 5 * time.Millisecond
	// inFlight chunks are on a connection's way in one direction: more than rate times delay of any link worth measuring.
	inFlight = 64
)

// Named returns the links that suites know.
func Named() map[string]Speed {
	const gigabit = 1_000_000_000 / 8
	return map[string]Speed{
		"loopback": {},
		"gigabit":  {BytesPerSecond: gigabit},
		"capped":   {BytesPerSecond: gigabit, ConnectionBytesPerSecond: 40_000_000, RoundTrip: 20 * time.Millisecond},
	}
}

// Link is shared by all of its connections.
type Link struct {
	speed Speed
	total *rate.Limiter
}

// New returns an idle link.
func New(s Speed) *Link { return &Link{speed: s, total: bucket(s.BytesPerSecond)} }

func bucket(bytesPerSecond int) *rate.Limiter {
	if bytesPerSecond == 0 {
		return rate.NewLimiter(rate.Inf, chunk)
	}
	return rate.NewLimiter(rate.Limit(bytesPerSecond), max(chunk, int(lateness.Seconds()*float64(bytesPerSecond))))
}

// Copy carries what comes from src to dst, as one connection of the link, until src ends.
func (l *Link) Copy(ctx context.Context, dst io.Writer, src io.Reader) error {
	connection := bucket(l.speed.ConnectionBytesPerSecond)
	return l.delayed(ctx, dst, src, func(n int) error {
		if err := connection.WaitN(ctx, n); err != nil {
			return err
		}
		return l.total.WaitN(ctx, n)
	})
}

// parcel is on its way, and there at a time.
type parcel struct {
	data []byte
	due  time.Time
}

// delayed carries bytes with half of the link's round trip of delay, each chunk once admit lets it pass.
func (l *Link) delayed(ctx context.Context, dst io.Writer, src io.Reader, admit func(int) error) error {
	ctx, cancel := context.WithCancel(ctx)
	way := make(chan parcel, inFlight)
	var read error
	var reader sync.WaitGroup
	defer reader.Wait()
	defer cancel()
	reader.Go(func() {
		defer close(way)
		for read == nil {
			data := make([]byte, chunk)
			var n int
			if n, read = src.Read(data); n > 0 {
				select {
				case way <- parcel{data: data[:n], due: time.Now().Add(l.speed.RoundTrip / 2)}:
				case <-ctx.Done():
					return
				}
			}
		}
	})
	for p := range way {
		if err := admit(len(p.data)); err != nil {
			return err
		}
		if err := pause(ctx, time.Until(p.due)); err != nil {
			return err
		}
		if _, err := dst.Write(p.data); err != nil {
			return err
		}
	}
	if errors.Is(read, io.EOF) {
		return nil
	}
	return read
}

func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Serve carries the connections that listener accepts to a TCP address until ctx is done, and then ends them. It returns when all
// are gone.
func (l *Link) Serve(ctx context.Context, listener net.Listener, target string) error {
	var connections sync.WaitGroup
	defer connections.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = listener.Close() })()
	for {
		client, err := listener.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", listener.Addr(), err)
		}
		connections.Go(func() { l.carry(ctx, client, target) })
	}
}

// carry serves one connection. What goes wrong with it the two ends see: it is closed.
func (l *Link) carry(ctx context.Context, client net.Conn, target string) {
	defer client.Close()
	if pause(ctx, l.speed.RoundTrip) != nil { // the handshake
		return
	}
	server, err := (&net.Dialer{}).DialContext(ctx, "tcp", target)
	if err != nil {
		return
	}
	defer server.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _, _ = client.Close(), server.Close() })()
	var requests sync.WaitGroup
	defer requests.Wait()
	requests.Go(func() {
		defer cancel()
		_ = l.delayed(ctx, server, client, func(int) error { return nil })
	})
	_ = l.Copy(ctx, client, server)
	cancel()
}
