package daemon_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/pki"
)

// authority is one that signs for a test.
func authority(t *testing.T) pki.Authorities {
	t.Helper()
	a, _, err := pki.Authorities{}.Renew(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func bundle(t *testing.T, a pki.Authorities, made time.Time, identity string) pki.Bundle {
	t.Helper()
	b, err := a.Issue(made, identity)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func folder(t *testing.T, b pki.Bundle) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tls")
	if err := pki.WriteDir(path, b); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string) *pki.Dir {
	t.Helper()
	d, err := pki.OpenDir(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// identity is who somebody is, by an authority, now.
func identity(t *testing.T, a pki.Authorities, name string) *pki.Dir {
	t.Helper()
	return open(t, folder(t, bundle(t, a, time.Now(), name)))
}

// node serves as a nodeagent does, for poolmanager and admin, until the test ends or stop is called.
func node(t *testing.T, keys *pki.Dir, h http.Handler) (address string, stop func() error) {
	t.Helper()
	l, err := daemon.ListenTLS(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- daemon.ServeTLS(ctx, slog.New(slog.DiscardHandler), l, keys, h, pki.Poolmanager, pki.Admin)
	}()
	end := sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = end() })
	return l.Addr().String(), end
}

// say is a handler that says over what it was asked, by whom.
func say(w http.ResponseWriter, r *http.Request) {
	_, _ = fmt.Fprint(w, r.Proto, " ", r.TLS.PeerCertificates[0].DNSNames)
}

// call makes a call as connect makes unary ones, or another request.
func call(ctx context.Context, client *http.Client, kind string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://hearth/x", strings.NewReader("x"))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", kind)
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(res.Body)
	return string(body), errors.Join(err, res.Body.Close())
}

const (
	unary  = "application/proto"
	stream = "application/connect+proto"
)

func TestTLSRoundTrip(t *testing.T) {
	a := authority(t)
	address, stop := node(t, identity(t, a, pki.Nodeagent), http.HandlerFunc(say))
	for _, who := range []string{pki.Poolmanager, pki.Admin} {
		client := daemon.TLSClient(identity(t, a, who), pki.Nodeagent, address)
		for kind, protocol := range map[string]string{unary: "HTTP/1.1", stream: "HTTP/2.0", "application/json": "HTTP/2.0"} {
			for range 2 {
				if got, err := call(t.Context(), client, kind); err != nil || got != protocol+" ["+who+"]" {
					t.Errorf("%s: %q, %v", kind, got, err)
				}
			}
		}
		client.CloseIdleConnections()
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// Who may not come in is not answered, and is told of no more than TLS says.
func TestTLSRefuses(t *testing.T) {
	a := authority(t)
	now := time.Now()
	good := identity(t, a, pki.Poolmanager)
	called := func(http.ResponseWriter, *http.Request) { t.Error("the handler was called") }
	address, _ := node(t, identity(t, a, pki.Nodeagent), http.HandlerFunc(called))
	// What OpenDir would refuse, TLS refuses too.
	pair := func(b pki.Bundle) *tls.Config {
		c, err := tls.X509KeyPair(b.Certificate, b.Key)
		if err != nil {
			t.Fatal(err)
		}
		own := good.Client(pki.Nodeagent, "h2")
		own.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
		return own
	}
	anonymous := good.Client(pki.Nodeagent, "h2")
	anonymous.GetClientCertificate = nil
	old := good.Client(pki.Nodeagent, "h2")
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for name, c := range map[string]struct {
		config *tls.Config
		want   string
	}{
		"no certificate":         {anonymous, "certificate required"},
		"another authority's":    {pair(bundle(t, authority(t), now, pki.Poolmanager)), "certificate"},
		"another identity":       {pair(bundle(t, a, now, pki.Gateway)), "certificate"},
		"its own kind":           {pair(bundle(t, a, now, pki.Nodeagent)), "certificate"},
		"expired":                {pair(bundle(t, a, now.Add(-31*24*time.Hour), pki.Poolmanager)), "certificate"},
		"not valid yet":          {pair(bundle(t, a, now.Add(2*time.Hour), pki.Poolmanager)), "certificate"},
		"TLS 1.2":                {old, "protocol version"},
		"asks for somebody else": {good.Client(pki.Gateway, "h2"), pki.Nodeagent},
	} {
		conn, err := tls.Dial("tcp", address, c.config)
		if err == nil { // in TLS 1.3 a client hears of its certificate with the first that it reads
			_, err = conn.Read(make([]byte, 1))
			_ = conn.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "POST /x HTTP/1.1\r\nHost: hearth\r\nContent-Length: 0\r\n\r\n")
	if answer, err := io.ReadAll(conn); err != nil || bytes.Contains(answer, []byte("200 OK")) {
		t.Errorf("plaintext: %q, %v", answer, err)
	}
	for name, client := range map[string]*http.Client{
		"a client of another authority":  daemon.TLSClient(identity(t, authority(t), pki.Poolmanager), pki.Nodeagent, address),
		"a client of another identity":   daemon.TLSClient(identity(t, a, pki.Gateway), pki.Nodeagent, address),
		"a client that asks for another": daemon.TLSClient(good, pki.Gateway, address),
	} {
		for _, kind := range []string{unary, stream} {
			if got, err := call(t.Context(), client, kind); err == nil {
				t.Errorf("%s: %q", name, got)
			}
		}
	}
	if err := daemon.ServeTLS(t.Context(), slog.New(slog.DiscardHandler), mustListen(t), good, http.NotFoundHandler()); err == nil {
		t.Error("a server that lets nobody in")
	}
}

// Strangers who open connections and say nothing keep nobody out, and are not kept for long.
func TestStrangersKeepNobodyOut(t *testing.T) {
	a := authority(t)
	address, _ := node(t, identity(t, a, pki.Nodeagent), http.HandlerFunc(say))
	var first net.Conn
	for n := range 600 {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if n == 0 {
			first = conn
		}
	}
	if _, err := first.Read(make([]byte, 1)); err == nil {
		t.Error("the first stranger was spoken to")
	}
	client := daemon.TLSClient(identity(t, a, pki.Poolmanager), pki.Nodeagent, address)
	for _, kind := range []string{unary, stream} {
		if got, err := call(t.Context(), client, kind); err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func mustListen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// All certificates change, and the authority with them, while calls are made: none fails.
func TestReloadUnderLoad(t *testing.T) {
	now := time.Now()
	early := now.Add(-pki.Spread) // the next authority was made then
	former, _, err := pki.Authorities{}.Renew(early.Add(-pki.AuthorityLife * 2 / 3))
	if err != nil {
		t.Fatal(err)
	}
	both, _, err := former.Renew(early)
	if err != nil {
		t.Fatal(err)
	}
	write := func(path string, b pki.Bundle) {
		if err := pki.WriteDir(path, b); err != nil {
			t.Fatal(err)
		}
	}
	ours, theirs := folder(t, bundle(t, former, now, pki.Poolmanager)), folder(t, bundle(t, former, now, pki.Nodeagent))
	address, _ := node(t, open(t, theirs), http.HandlerFunc(say))
	keys := open(t, ours)
	client := daemon.TLSClient(keys, pki.Nodeagent, address)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var callers sync.WaitGroup
	calls := make(chan struct{})
	for _, kind := range []string{unary, unary, stream} {
		callers.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				if n%10 == 9 { // so that there are handshakes
					client.CloseIdleConnections()
				}
				if _, err := call(t.Context(), client, kind); err != nil {
					t.Errorf("%s: %v", kind, err)
					return
				}
				select {
				case calls <- struct{}{}:
				case <-ctx.Done():
				}
			}
		})
	}
	several := func() {
		for range 40 {
			select {
			case <-calls:
			case <-t.Context().Done():
				return
			}
		}
	}
	several()
	for _, who := range []pki.Authorities{former, both} { // by the former, before all have heard of the next
		for id, path := range map[string]string{pki.Poolmanager: ours, pki.Nodeagent: theirs} {
			write(path, bundle(t, who, early, id))
			several()
		}
	}
	for id, path := range map[string]string{pki.Poolmanager: ours, pki.Nodeagent: theirs} { // by the next
		write(path, bundle(t, both, now, id))
		several()
	}
	if signer(t, both, now) == signer(t, both, early) {
		t.Error("the next authority has not signed")
	}
	cancel()
	callers.Wait()
}

func signer(t *testing.T, a pki.Authorities, now time.Time) string {
	t.Helper()
	block, _ := pem.Decode(bundle(t, a, now, pki.Admin).Certificate)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c.Issuer.String()
}

// What a certificate has begun ends with it.
func TestUntilExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		h := daemon.UntilExpiry(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Content-Type") == stream {
				<-r.Context().Done()
			}
		}))
		ask := func(kind string) http.Header {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
			r.Header.Set("Content-Type", kind)
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{NotAfter: begun.Add(time.Hour)}}}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			return w.Result().Header
		}
		if got := ask(unary).Get("Connection"); got != "" {
			t.Errorf("connection: %q", got)
		}
		if ask(stream); time.Since(begun) != time.Hour {
			t.Errorf("the stream ended after %s", time.Since(begun))
		}
		if got := ask(unary).Get("Connection"); got != "close" {
			t.Errorf("connection: %q", got)
		}
	})
}

// Who was trusted is not, from the next handshake on, whatever was agreed before.
func TestAuthorityIsGivenUp(t *testing.T) {
	now := time.Now()
	former, next := authority(t), authority(t)
	path := folder(t, bundle(t, former, now, pki.Nodeagent))
	address, _ := node(t, open(t, path), http.HandlerFunc(say))
	old := identity(t, former, pki.Poolmanager)
	client := daemon.TLSClient(old, pki.Nodeagent, address)
	if _, err := call(t.Context(), client, unary); err != nil {
		t.Fatal(err)
	}
	if err := pki.WriteDir(path, bundle(t, next, now, pki.Nodeagent)); err != nil {
		t.Fatal(err)
	}
	client.CloseIdleConnections()
	if got, err := call(t.Context(), client, unary); err == nil {
		t.Errorf("answered %q", got)
	}
	if got, err := call(t.Context(), daemon.TLSClient(identity(t, next, pki.Poolmanager), pki.Nodeagent, address), unary); err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// relayed is a TCP relay that can stop saying anything, as a peer does whose machine has lost its power.
type relayed struct {
	net.Listener
	silent chan struct{}
}

func silence(t *testing.T, to string) *relayed {
	t.Helper()
	r := &relayed{mustListen(t), make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	pass := func(from, to net.Conn) {
		buffer := make([]byte, 64<<10)
		for {
			n, err := from.Read(buffer)
			select {
			case <-r.silent:
				<-ctx.Done() // says nothing any more, and hangs up on nobody
				return
			default:
			}
			if _, failed := to.Write(buffer[:n]); err != nil || failed != nil {
				_, _ = from.Close(), to.Close()
				return
			}
		}
	}
	work.Go(func() {
		for {
			ours, err := r.Accept()
			if err != nil {
				return
			}
			theirs, err := net.Dial("tcp", to)
			if err != nil {
				_ = ours.Close()
				continue
			}
			stop := context.AfterFunc(ctx, func() { _, _ = ours.Close(), theirs.Close() })
			work.Go(func() { defer stop(); pass(ours, theirs) })
			work.Go(func() { pass(theirs, ours) })
		}
	})
	t.Cleanup(func() { cancel(); _ = r.Close(); work.Wait() })
	return r
}

// A stream's peer falls silent: the stream ends, although nobody sent an end.
func TestSilentPeerIsNoticed(t *testing.T) {
	a := authority(t)
	address, _ := node(t, identity(t, a, pki.Nodeagent), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hello")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	between := silence(t, address)
	client := daemon.TLSClient(identity(t, a, pki.Poolmanager), pki.Nodeagent, between.Addr().String())
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://hearth/x", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", stream)
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if _, err := io.ReadFull(res.Body, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	close(between.silent)
	if _, err := res.Body.Read(make([]byte, 1)); err == nil {
		t.Error("somebody spoke")
	}
}

// Who accepts and then says nothing costs a caller no more than the time for a handshake.
func TestSilentListener(t *testing.T) {
	l := mustListen(t)
	defer l.Close()
	client := daemon.TLSClient(identity(t, authority(t), pki.Poolmanager), pki.Nodeagent, l.Addr().String())
	for _, kind := range []string{unary, stream} {
		if _, err := call(t.Context(), client, kind); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

// A peer that is killed is unavailable, whether before its answer or in the midst of it; who gives up has given up, and is told so.
func TestBrokenCallsAreUnavailable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	begins, asked := make(chan string, 1), make(chan struct{}, 10)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hang := make(chan struct{})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = conn.Read(make([]byte, 1)) // and what is left unread makes it a reset
				begin := <-begins
				_, _ = io.WriteString(conn, begin)
				asked <- struct{}{}
				if begin == "" {
					select {
					case <-hang:
					case <-t.Context().Done():
					}
				}
				_ = conn.Close()
			}()
		}
	}()
	client := daemon.UnixClient(path)
	for _, begin := range []string{"HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"} {
		begins <- begin
		if got, err := call(t.Context(), client, unary); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("%q: %q, %v", begin, got, err)
		}
		<-asked
	}
	begins <- ""
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	if _, err := call(ctx, client, unary); !errors.Is(err, context.Canceled) || connect.CodeOf(err) == connect.CodeUnavailable {
		t.Errorf("given up: %v", err)
	}
	begins <- ""
	go func() { <-asked; close(hang) }()
	if _, err := call(t.Context(), client, unary); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("killed: %v", err)
	}
	_ = l.Close()
	for _, kind := range []string{unary, stream} {
		if _, err := call(t.Context(), client, kind); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("nobody there: %v", err)
		}
	}
}

// A server that has ended and come again under its address is called without an error: idle connections of before are not used.
func TestRestartedServer(t *testing.T) {
	a := authority(t)
	keys := identity(t, a, pki.Nodeagent)
	address, stop := node(t, keys, http.HandlerFunc(say))
	client := daemon.TLSClient(identity(t, a, pki.Poolmanager), pki.Nodeagent, address)
	if _, err := call(t.Context(), client, unary); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	l, err := daemon.ListenTLS(t.Context(), address)
	if err != nil {
		t.Skipf("the port was taken meanwhile: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- daemon.ServeTLS(ctx, slog.New(slog.DiscardHandler), l, keys, http.HandlerFunc(say), pki.Poolmanager)
	}()
	if got, err := call(t.Context(), client, unary); err != nil {
		t.Errorf("%q, %v", got, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestNetworkFlags(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	if err := (&daemon.Network{}).Serve(t.Context(), log, http.NotFoundHandler()); err != nil {
		t.Errorf("no address: %v", err)
	}
	n := daemon.Network{Address: "127.0.0.1:0", TLSDir: t.TempDir()}
	if err := n.Serve(t.Context(), log, http.NotFoundHandler(), pki.Admin); err == nil || !strings.Contains(err.Error(), "TLS only") {
		t.Errorf("no certificates: %v", err)
	}
}
