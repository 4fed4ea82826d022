package relay

import (
	"bufio"
	"cmp"
	"context"
	"net"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// shortIdleTime is shorter than what servers commonly keep idle connections for (gunicorn 2 s, node 5 s), so that the server does
	// not close one just as a request goes out on it. A new one costs a tenth of a millisecond.
	shortIdleTime = 1500 * time.Millisecond
	// maxHeaderBytes bounds the header of an answer, those of its 1xx answers included.
	maxHeaderBytes = 1 << 20
	// maxInlineBytes bounds the body of a request that is sent with its header, by the goroutine that waits for the answer. It fits
	// into what the kernel holds for a connection, so sending it does not depend on a server that answers before it reads.
	maxInlineBytes = 16 << 10
	continueTime   = time.Second // for a server to say whether it wants the body

	defaultBufferBytes = 4 << 10
)

// TransportConfig says how connections to a server are made and kept.
type TransportConfig struct {
	Dial        func(context.Context) (net.Conn, error)
	MaxIdle     int // connections of HTTP/1.1
	BufferBytes int // for reading from each of them
	// IdleTime is how long they are kept; 0 for a time that is shorter than that of common servers.
	IdleTime time.Duration
	HTTP2    *http.HTTP2Config
}

// Transport is an http.RoundTripper to one server, whatever a request's URL names. It sends gRPC over h2c, everything else over
// HTTP/1.1.
//
// net/http's transport has two goroutines at each connection, and a request and its answer go through both. A request with no body, or a
// small one, does not need them: it is written, and its answer read, by the goroutine that makes the round trip, while
// context.AfterFunc waits for who gives up. Upgrades, large bodies and those of unknown length, which may have to be sent while the answer
// comes, Expect and trailers go net/http's way.
//
// Like net/http's, it sends a request a second time only if it went out on a connection that had been idle and that ended without a
// byte of an answer, and if it was not written at all, or has no body and a method that may run twice. Of httptrace it tells
// Got1xxResponse. Its errors may be a Failure.
type Transport struct {
	config  TransportConfig
	plain   *http.Transport // HTTP/1.1, what is not simple
	grpc    *http.Transport // h2c
	buffers sync.Pool       // *bytes.Buffer, for requests

	mu     sync.Mutex  // guards what follows
	idle   []*upstream // the one that was used last is last
	closed bool        // there has been no request since idle connections were closed: those that become idle are closed too
	reaper *time.Timer // closes what has been idle for too long; nil if nothing was idle when it last looked
}

// NewTransport returns a Transport that has no connection yet.
func NewTransport(c TransportConfig) *Transport {
	c.IdleTime = cmp.Or(c.IdleTime, shortIdleTime)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) }
	h2c := new(http.Protocols)
	h2c.SetUnencryptedHTTP2(true)
	return &Transport{
		config: c,
		plain: &http.Transport{
			DialContext: dial, DisableCompression: true, MaxIdleConnsPerHost: c.MaxIdle, IdleConnTimeout: c.IdleTime,
			ExpectContinueTimeout: continueTime, MaxResponseHeaderBytes: maxHeaderBytes,
			WriteBufferSize: c.BufferBytes, ReadBufferSize: c.BufferBytes,
		},
		grpc: &http.Transport{
			DialContext: dial, DisableCompression: true, IdleConnTimeout: c.IdleTime, MaxResponseHeaderBytes: maxHeaderBytes,
			Protocols: h2c, HTTP2: c.HTTP2,
		},
	}
}

func (c *TransportConfig) dial(ctx context.Context) (net.Conn, error) {
	conn, err := c.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return TakeOver(conn), nil
}

// needsHTTP2 tells whether a request has to go on over HTTP/2: gRPC needs it all the way. Everything else takes HTTP/1.1, which
// every Function speaks.
func needsHTTP2(r *http.Request) bool {
	return r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	switch {
	case needsHTTP2(r):
		return roundTrip(t.grpc, r)
	case simple(r):
		return t.exchange(r)
	default:
		return roundTrip(t.plain, r)
	}
}

// roundTrip makes net/http's.
func roundTrip(t *http.Transport, r *http.Request) (*http.Response, error) {
	var reused, written atomic.Bool
	ctx := httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		GotConn:      func(c httptrace.GotConnInfo) { reused.Store(c.Reused) },
		WroteHeaders: func() { written.Store(true) },
	})
	res, err := t.RoundTrip(r.WithContext(ctx))
	if err != nil {
		return nil, &Failure{err, reused.Load(), written.Load()}
	}
	return res, nil
}

// Failure says how far a round trip came that has failed.
type Failure struct {
	Err     error
	Reused  bool // its connection had been idle: the server may have closed it when it liked
	Written bool // some of the request may have reached the server
}

// Error implements error.
func (f *Failure) Error() string { return f.Err.Error() }

// Unwrap gives Err.
func (f *Failure) Unwrap() error { return f.Err }

// simple says whether all of a request can be written before its answer is read.
func simple(r *http.Request) bool {
	bodyless := r.Body == nil || r.Body == http.NoBody
	return r.Method != http.MethodConnect && (bodyless || r.ContentLength > 0 && r.ContentLength <= maxInlineBytes) &&
		len(r.TransferEncoding) == 0 && len(r.Trailer) == 0 && r.Header["Expect"] == nil && r.Header["Upgrade"] == nil
}

// CloseIdleConnections closes those that have no request.
func (t *Transport) CloseIdleConnections() {
	t.plain.CloseIdleConnections()
	t.grpc.CloseIdleConnections()
	t.mu.Lock()
	idle := t.idle
	t.idle, t.closed = nil, true
	if t.reaper != nil {
		t.reaper.Stop()
		t.reaper = nil
	}
	t.mu.Unlock()
	drop(idle)
}

// connect gives a connection that is idle, or a new one.
func (t *Transport) connect(ctx context.Context) (c *upstream, reused bool, err error) {
	for c = t.take(); c != nil; c = t.take() {
		if time.Since(c.idleAt) < t.config.IdleTime && c.quiet() {
			return c, true, nil
		}
		_ = c.Close() // its server has closed it, or has said something that nobody asked for
	}
	if ctx.Err() != nil {
		return nil, false, context.Cause(ctx)
	}
	raw, err := t.config.dial(ctx)
	if err != nil {
		return nil, false, err
	}
	c = &upstream{Conn: raw, idleAt: time.Now()}
	c.in = bufio.NewReaderSize(source{c}, cmp.Or(t.config.BufferBytes, defaultBufferBytes))
	return c, false, nil
}

// take takes the connection that was used last.
func (t *Transport) take() *upstream {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = false
	last := len(t.idle) - 1
	if last < 0 {
		return nil
	}
	c := t.idle[last]
	t.idle[last] = nil
	t.idle = t.idle[:last]
	return c
}

// keep takes a connection back, to whose last request all has been said.
func (t *Transport) keep(c *upstream) {
	c.idleAt = time.Now()
	t.mu.Lock()
	kept := !t.closed && len(t.idle) < t.config.MaxIdle && c.in.Buffered() == 0
	if kept {
		t.idle = append(t.idle, c)
		if t.reaper == nil {
			t.reaper = time.AfterFunc(t.config.IdleTime, t.reap)
		}
	}
	t.mu.Unlock()
	if !kept {
		_ = c.Close() // nobody needs it any more
	}
}

// reap closes what has been idle for too long.
func (t *Transport) reap() {
	now := time.Now()
	t.mu.Lock()
	var dead []*upstream
	t.idle = slices.DeleteFunc(t.idle, func(c *upstream) bool {
		old := now.Sub(c.idleAt) >= t.config.IdleTime
		if old {
			dead = append(dead, c)
		}
		return old
	})
	t.reaper = nil
	if len(t.idle) > 0 {
		t.reaper = time.AfterFunc(t.config.IdleTime-now.Sub(t.idle[0].idleAt), t.reap)
	}
	t.mu.Unlock()
	drop(dead)
}

func drop(idle []*upstream) {
	for _, c := range idle {
		_ = c.Close() // nobody needs it any more
	}
}
