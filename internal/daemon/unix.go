package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/relay"
)

const (
	// MaxSocketPathBytes is the longest path of a Unix socket that Linux takes.
	MaxSocketPathBytes = 107

	drainTime  = 3 * time.Second // calls in flight may end by themselves
	cancelTime = 2 * time.Second // and then have this long to notice that they were cancelled
)

// ServeUnix serves h (HTTP/1.1 and h2c) on a Unix socket that only its owner may use, until ctx is done; then it ends
// streams at once, lets calls in flight finish for a short while, cancels the rest, and returns nil with the socket removed.
//
// A socket that an earlier process left is replaced; one that somebody listens on is an error that names it.
func ServeUnix(ctx context.Context, path string, h http.Handler) error {
	l, err := listenUnix(ctx, path)
	if err != nil {
		return err
	}
	return serve(ctx, l, h)
}

func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return runServer(ctx, l, &http.Server{Handler: h, Protocols: protocols})
}

// runServer serves until ctx is done, as ServeUnix says; with TLS if the server has it.
func runServer(ctx context.Context, l net.Listener, server *http.Server) error {
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	server.Handler = endStreams(ctx, server.Handler)
	server.ReadHeaderTimeout = 10 * time.Second
	server.BaseContext = func(net.Listener) context.Context { return base }
	failed := make(chan error, 1)
	go func() {
		if server.TLSConfig != nil {
			failed <- server.ServeTLS(relay.Listener(l), "", "")
			return
		}
		failed <- server.Serve(relay.Listener(l))
	}()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	drain(base, cancel, server)
	<-failed
	return nil
}

func drain(base context.Context, cancel func(), server *http.Server) {
	patient, done := context.WithTimeout(base, drainTime)
	defer done()
	if server.Shutdown(patient) == nil {
		return
	}
	cancel()
	last, done := context.WithTimeout(context.WithoutCancel(base), cancelTime)
	defer done()
	if server.Shutdown(last) != nil {
		_ = server.Close()
	}
}

// endStreams cancels streaming calls (watches, logs) as soon as stop is done: they would never end by themselves.
func endStreams(stop context.Context, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isStream(r) {
			h.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(stop, cancel)()
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}

func isStream(r *http.Request) bool {
	return strings.HasPrefix(r.Header.Get("Content-Type"), "application/connect+")
}

// Server is what ServeUnixWith runs: Stop ends Serve, also one that has not begun.
type Server interface {
	Serve(l net.Listener) error
	Stop()
}

// ServeUnixWith serves as ServeUnix does with a server of another kind, gRPC's for example, until ctx is done. What is under way
// then is cut off.
func ServeUnixWith(ctx context.Context, path string, server Server) error {
	l, err := listenUnix(context.WithoutCancel(ctx), path) // who ends before it has begun has not failed
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, server.Stop)()
	if err := server.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", path, err)
	}
	return nil
}

// listenUnix listens as ServeUnix does.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if err := CheckSocketPath(path); err != nil {
		return nil, err
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	// On Linux a socket's file takes the mode that its descriptor has when it is bound, so that there is no moment in
	// which others may connect.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		if err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	l, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on socket %s: %w", path, err)
	}
	return l, nil
}

// CheckSocketPath returns an error that says what to do when path is too long for a Unix socket.
func CheckSocketPath(path string) error {
	if len(path) > MaxSocketPathBytes {
		return fmt.Errorf("socket path %s has %d bytes, and the system takes %d: choose a shorter directory", path, len(path), MaxSocketPathBytes)
	}
	return nil
}

func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("socket %s: there is something else of that name (%s)", path, info.Mode())
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("socket %s: another process listens on it; stop that one first", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}

// UnixClient returns a client whose every request goes to the socket, whatever host the URL names; by convention
// "http://hearth". It sets no overall time-out: callers' contexts do.
func UnixClient(path string) *http.Client {
	dial := func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", path)
	}
	return newClient(dial, dial, idleCallTime, &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second})
}

// newClient makes a client of two ways to connect: for unary calls and for the rest.
func newClient(calls, rest func(context.Context) (net.Conn, error), idle time.Duration, pings *http.HTTP2Config) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: byKind{
		calls: relay.NewTransport(relay.TransportConfig{Dial: calls, MaxIdle: maxIdleCalls, IdleTime: idle}),
		rest: &http.Transport{
			Protocols:   protocols,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return rest(ctx) },
			HTTP2:       pings,
		},
	}}
}

const (
	maxIdleCalls = 64        // connections that are kept for calls to come; more are made when they are needed
	idleCallTime = time.Hour // on one machine; our servers close none
)

// byKind sends unary RPCs over connections of HTTP/1.1, one call at a time each, in the goroutine that makes the call: a start is a chain
// of them. Streams, which may be silent for long, are HTTP/2's: it asks whether the peer still lives.
type byKind struct {
	calls *relay.Transport
	rest  *http.Transport
}

// RoundTrip implements http.RoundTripper.
func (t byKind) RoundTrip(r *http.Request) (*http.Response, error) {
	var next http.RoundTripper = t.rest
	if r.Header.Get("Content-Type") == "application/proto" { // as connect has it for unary calls
		next = t.calls
	}
	res, err := next.RoundTrip(r)
	if err != nil {
		return nil, unavailable(r.Context(), err)
	}
	if res.Body != http.NoBody {
		res.Body = answer{res.Body, r.Context()}
	}
	return res, nil
}

// unavailable says of a failure that nobody who called has brought about that the peer is not available. connect would go by the kind of
// error: a peer that was killed is "canceled" to it, and one that cannot be connected to in time "deadline exceeded", as if callers had
// given up or waited for too long; then nobody asks again.
func unavailable(ctx context.Context, err error) error {
	if at, ok := ctx.Deadline(); ctx.Err() != nil || ok && !time.Now().Before(at) {
		return err
	}
	return connect.NewError(connect.CodeUnavailable, err)
}

// answer is the body of one.
type answer struct {
	io.ReadCloser
	ctx context.Context //nolint:containedctx // of the request, as long as which it lives
}

// Read implements io.Reader.
func (a answer) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // that is the end
		err = unavailable(a.ctx, err)
	}
	return n, err
}

// CloseIdleConnections is what http.Client calls.
func (t byKind) CloseIdleConnections() {
	t.calls.CloseIdleConnections()
	t.rest.CloseIdleConnections()
}
