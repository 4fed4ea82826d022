package sidecar_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/sidecar"
	"github.com/hearth-serverless/hearth/sidecar/control"
)

// patience is for what another goroutine brings about; a test that needs all of it has failed.
const patience = 30 * time.Second

// world is a sidecar with nodeagent's end of its control.
type world struct {
	t      testing.TB
	socket string
	agent  *control.Client
	events chan event
	hangUp func() // nodeagent goes away
}

type event struct {
	kind   control.Event
	reason string
}

func newWorld(t testing.TB) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "sidecar") // t.TempDir's path is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, socket: filepath.Join(dir, control.Socket)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- sidecar.New().Run(ctx, w.socket) }()
	t.Cleanup(func() {
		w.hangUp()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	w.connect()
	return w
}

// connect is nodeagent's start.
func (w *world) connect() {
	w.t.Helper()
	var conn net.Conn
	eventually(w.t, "the sidecar listens", func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", w.socket)
		return err == nil
	})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := control.NewClient(ctx, conn)
	if err != nil {
		w.t.Fatal(err)
	}
	events := make(chan event, 1000)
	var following sync.WaitGroup
	following.Go(func() {
		if err := c.Follow(func(e control.Event, reason string) { events <- event{e, reason} }); err != nil {
			w.t.Errorf("follow: %v", err)
		}
	})
	w.agent, w.events = c, events
	w.hangUp = sync.OnceFunc(func() {
		_ = c.Close()
		following.Wait()
	})
}

func (w *world) hear(want control.Event) event {
	w.t.Helper()
	late := time.After(patience)
	for {
		select {
		case e := <-w.events:
			if e.kind == want {
				return e
			}
		case <-late:
			w.t.Fatalf("event %d was not told", want)
		}
	}
}

// serve has the sidecar serve h, and returns where.
func (w *world) serve(h http.Handler, change func(*control.Serve)) (string, *httptest.Server) {
	w.t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	f := httptest.NewUnstartedServer(h)
	f.Config.Protocols = protocols
	f.Start()
	w.t.Cleanup(f.Close)
	return w.serveAt(f.Listener.Addr().String(), change), f
}

func question(target string) control.Serve {
	return control.Serve{
		Function: "hello-00001", Listen: netip.MustParseAddrPort("127.0.0.1:0"), Probe: netip.MustParseAddrPort("127.0.0.1:0"),
		Targets: []netip.AddrPort{netip.MustParseAddrPort(target)}, Concurrency: 100, Queue: 100,
	}
}

func (w *world) serveAt(target string, change func(*control.Serve)) string {
	w.t.Helper()
	s := question(target)
	if change != nil {
		change(&s)
	}
	return w.ask(s).Listen.String()
}

func (w *world) ask(s control.Serve) control.Serving {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	at, err := w.agent.Serve(ctx, s)
	if err != nil {
		w.t.Fatal(err)
	}
	return at
}

// client is the gateway.
func client(t testing.TB, h2 bool) *http.Client {
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 1000, ExpectContinueTimeout: patience}
	if h2 {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// both runs a test over HTTP/1.1 and h2c.
func both(t *testing.T, h http.HandlerFunc, test func(t *testing.T, url string, c *http.Client)) {
	for _, proto := range []string{"http1", "h2c"} {
		t.Run(proto, func(t *testing.T) {
			w := newWorld(t)
			at, _ := w.serve(h, nil)
			test(t, "http://"+at, client(t, proto == "h2c"))
		})
	}
}

type answer struct {
	status int
	header http.Header
	body   string
	err    error
}

func do(c *http.Client, r *http.Request) answer {
	res, err := c.Do(r)
	if err != nil {
		return answer{err: err}
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(body), err}
}

func get(c *http.Client, url string) answer {
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return answer{err: err}
	}
	return do(c, r)
}

func (a answer) code(t testing.TB) string {
	t.Helper()
	var e struct{ Error, Reason string }
	if err := json.Unmarshal([]byte(a.body), &e); err != nil || e.Reason == "" {
		t.Fatalf("%d %q: %v, %v", a.status, a.body, a.err, err)
	}
	return fmt.Sprint(a.status, " ", e.Error)
}

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for limit := time.Now().Add(patience); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		if holds() {
			return
		}
	}
	t.Fatalf("in vain: %s", what)
}
