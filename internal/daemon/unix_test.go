package daemon_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// serve runs ServeUnix until the test ends (or stop is called) and returns once the socket answers.
func serve(t *testing.T, path string, h http.Handler) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- daemon.ServeUnix(ctx, path, h) }()
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			_ = conn.Close()
			break
		}
		select {
		case err := <-done:
			t.Fatal(err)
		default:
		}
	}
	t.Cleanup(cancel)
	return func() error { cancel(); return <-done }
}

func TestUnixRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	// What a killed process leaves behind: a socket file that nobody listens on.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	stop := serve(t, path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte(r.Proto)) }))
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	expect(t, daemon.UnixClient(path), "http://hearth/", 200, "HTTP/2.0")
	if err := daemon.ServeUnix(t.Context(), path, http.NotFoundHandler()); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("second listener: %v", err)
	}
	expect(t, daemon.UnixClient(path), "http://hearth/", 200, "HTTP/2.0")
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket is still there: %v", err)
	}
}

func TestUnixPathErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	write(t, file, "x")
	for path, want := range map[string]string{
		file: "something else",
		filepath.Join(dir, strings.Repeat("x", 120)): "shorter directory",
		filepath.Join(dir, "no", "s"):                "no such file",
	} {
		if err := daemon.ServeUnix(t.Context(), path, http.NotFoundHandler()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

func TestStreamsEndWithTheServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	started := make(chan struct{})
	stop := serve(t, path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		close(started)
		<-r.Context().Done()
	}))
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://hearth/x", strings.NewReader("x"))
	req.Header.Set("Content-Type", "application/connect+proto")
	client := daemon.UnixClient(path)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	<-started
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// cutOff is a server that may be stopped before it serves.
type cutOff struct{ stopped chan struct{} }

func (c cutOff) Stop() { close(c.stopped) }

func (c cutOff) Serve(l net.Listener) error {
	<-c.stopped
	return errors.Join(errors.New("the server has been stopped"), l.Close())
}

func TestServeUnixWith(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := daemon.ServeUnixWith(ctx, path, cutOff{make(chan struct{})}); err != nil {
		t.Errorf("ended before it began: %v", err)
	}
	broken := cutOff{make(chan struct{})}
	broken.Stop()
	if err := daemon.ServeUnixWith(t.Context(), path, unstoppable{broken}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("it failed with %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

type unstoppable struct{ cutOff }

func (unstoppable) Stop() {}
