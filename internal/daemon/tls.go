package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/pki"
	"github.com/hearth-serverless/hearth/internal/relay"
)

// What a network may do to a connection between daemons, at most. A peer that has died without a word is noticed within deadTime by who waits
// for it: what was sent is not acknowledged, what TCP or HTTP/2 asks is not answered.
const (
	dialTime      = time.Second // TCP's part
	handshakeTime = 2 * time.Second
	deadTime      = 3 * time.Second
	probeTime     = time.Second
	maxStrangers  = 256
	idleTLSTime   = time.Minute // of connections for calls: each is asked now and then whether it lives
)

// Network are the flags of a daemon that others reach over the network.
type Network struct {
	Address string // HOST:PORT; empty is none
	TLSDir  string
}

// Flags adds --rpc-address and --tls-dir.
func (n *Network) Flags(f *pflag.FlagSet) {
	f.StringVar(&n.Address, "rpc-address", "", "HOST:PORT to serve on over TLS as well, for whoever has a certificate that is let in (default: none)")
	TLSDirVar(f, &n.TLSDir)
}

// TLSDirVar adds --tls-dir.
func TLSDirVar(f *pflag.FlagSet, dir *string) {
	f.StringVar(dir, "tls-dir", "/etc/hearth/tls", "folder of "+pki.AuthorityFile+", "+pki.CertificateFile+" and "+pki.KeyFile+" for the network; used anew when they change")
}

// Serve serves h as ServeTLS does if there is an address, and otherwise nothing.
func (n *Network) Serve(ctx context.Context, log *slog.Logger, h http.Handler, allowed ...string) error {
	if n.Address == "" {
		return nil
	}
	keys, err := pki.OpenDir(n.TLSDir, log)
	if err != nil {
		return fmt.Errorf("--rpc-address is served over TLS only: %w", err)
	}
	l, err := ListenTLS(ctx, n.Address)
	if err != nil {
		return err
	}
	log.Info("serving on the network", "address", l.Addr().String(), "to", allowed)
	return ServeTLS(ctx, log, l, keys, h, allowed...)
}

// ListenTLS listens for ServeTLS. What it accepts notices peers that have died.
func ListenTLS(ctx context.Context, address string) (net.Listener, error) {
	config := net.ListenConfig{KeepAliveConfig: keepAlive(), Control: boundSilence}
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serve on %s: %w", address, err)
	}
	return l, nil
}

// ServeTLS serves h (HTTP/1.1 and HTTP/2) on l, which it closes, to those who have a certificate of an allowed identity, until ctx is done;
// then it ends as ServeUnix does. A connection ends with the certificate with which it was made.
func ServeTLS(ctx context.Context, log *slog.Logger, l net.Listener, keys *pki.Dir, h http.Handler, allowed ...string) error {
	if len(allowed) == 0 {
		return errors.Join(errors.New("serve over TLS: nobody is let in"), l.Close())
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	return runServer(ctx, l, &http.Server{
		Handler: untilExpiry(h), Protocols: protocols, TLSConfig: keys.Server(allowed...), ConnState: new(strangers).state,
		HTTP2:    &http.HTTP2Config{SendPingTimeout: probeTime, PingTimeout: probeTime},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug), // any stranger may cause a line
	})
}

// strangers are connections of which nobody knows yet whose they are. Anyone who reaches the port can open any number, so the oldest has to
// go when there are too many; who may come in is in within milliseconds.
type strangers struct {
	mu  sync.Mutex // guards all
	all []net.Conn // the oldest first
}

// state is what http.Server calls.
func (s *strangers) state(c net.Conn, now http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now != http.StateNew {
		if n := slices.Index(s.all, c); n >= 0 {
			s.all = slices.Delete(s.all, n, n+1)
		}
		return
	}
	if s.all = append(s.all, c); len(s.all) <= maxStrangers {
		return
	}
	if over, ok := s.all[0].(*tls.Conn); ok {
		_ = over.NetConn().Close() // without a word
	}
	s.all = slices.Delete(s.all, 0, 1)
}

// untilExpiry ends what a client's certificate has begun when that expires: streams then, connections with their next call.
func untilExpiry(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		end := r.TLS.PeerCertificates[0].NotAfter
		if !time.Now().Before(end) {
			w.Header().Set("Connection", "close")
		}
		if !isStream(r) {
			h.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithDeadline(r.Context(), end)
		defer cancel()
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}

// TLSClient returns a client whose every request goes to HOST:PORT, whatever host the URL names, if who is there has an identity; by
// convention "http://hearth", as with UnixClient.
func TLSClient(keys *pki.Dir, identity, address string) *http.Client {
	dial := func(protocol string) func(context.Context) (net.Conn, error) {
		return func(ctx context.Context) (net.Conn, error) {
			return dialTLS(ctx, address, keys.Client(identity, protocol))
		}
	}
	return newClient(dial("http/1.1"), dial("h2"), idleTLSTime, &http.HTTP2Config{SendPingTimeout: probeTime, PingTimeout: probeTime})
}

func dialTLS(ctx context.Context, address string, config *tls.Config) (net.Conn, error) {
	dialer := net.Dialer{Timeout: dialTime, KeepAliveConfig: keepAlive(), Control: boundSilence}
	raw, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(relay.TakeOver(raw), config)
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // without a word: there may be nobody who hears it
		return nil, fmt.Errorf("TLS with %s: %w", address, err)
	}
	return conn, nil
}

// keepAlive has TCP ask a silent peer.
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 2 * probeTime, Interval: probeTime, Count: 2}
}

// boundSilence has TCP give a connection up to whose data nobody says a word. What a listener accepts inherits it.
func boundSilence(_, _ string, c syscall.RawConn) error {
	var failed error
	if err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadTime.Milliseconds()))
	}); err != nil {
		return err
	}
	return failed
}
