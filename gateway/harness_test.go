package gateway_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/gateway"
)

// fakePool is poolmanager as the gateway sees it.
type fakePool struct {
	mu        sync.Mutex
	version   int64
	functions map[string]*hearthv1.Endpoints
	streams   map[chan *hearthv1.WatchResponse]bool
	reports   []*hearthv1.ReportRequest
	down      bool
	changed   chan struct{} // closed and replaced at each report

	released  []string
	keeps     bool // nothing is released
	allocate  func(ctx context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error)
	allocates atomic.Int64
}

func newFakePool() *fakePool {
	return &fakePool{functions: map[string]*hearthv1.Endpoints{}, streams: map[chan *hearthv1.WatchResponse]bool{}, changed: make(chan struct{})}
}

var errDown = connect.NewError(connect.CodeUnavailable, errors.New("poolmanager is away"))

func (p *fakePool) Allocate(ctx context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
	p.allocates.Add(1)
	p.mu.Lock()
	down := p.down
	p.mu.Unlock()
	if down || p.allocate == nil {
		return nil, errDown
	}
	return p.allocate(ctx, req)
}

func (p *fakePool) Watch(ctx context.Context, _ string, event func(*hearthv1.WatchResponse)) error {
	stream := make(chan *hearthv1.WatchResponse, 10000)
	p.mu.Lock()
	if p.down {
		p.mu.Unlock()
		return errDown
	}
	for _, e := range p.functions {
		stream <- endpointsEvent(e)
	}
	stream <- &hearthv1.WatchResponse{Event: &hearthv1.WatchResponse_Synced{Synced: true}}
	p.streams[stream] = true
	p.mu.Unlock()
	for {
		select {
		case m, ok := <-stream:
			if !ok {
				return errDown
			}
			event(m)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (p *fakePool) Report(_ context.Context, req *hearthv1.ReportRequest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down {
		return errDown
	}
	p.reports = append(p.reports, proto.CloneOf(req))
	close(p.changed)
	p.changed = make(chan struct{})
	return nil
}

func (p *fakePool) Release(_ context.Context, req *hearthv1.ReleaseRequest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down || p.keeps {
		return errDown
	}
	p.released = append(p.released, req.GetInstanceId())
	return nil
}

// gaveBack lists the Instances that were released.
func (p *fakePool) gaveBack() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.released)
}

func endpointsEvent(e *hearthv1.Endpoints) *hearthv1.WatchResponse {
	return &hearthv1.WatchResponse{Event: &hearthv1.WatchResponse_Endpoints{Endpoints: proto.CloneOf(e)}}
}

// set changes what is known of a function and tells the watchers; it returns the version.
func (p *fakePool) set(name string, change func(e *hearthv1.Endpoints)) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.functions[name]
	if e == nil {
		e = &hearthv1.Endpoints{Function: name, Spec: &hearthv1.FunctionSpec{Scaling: &hearthv1.Scaling{}}}
		p.functions[name] = e
	}
	change(e)
	p.version++
	e.Version = p.version
	p.send(endpointsEvent(e))
	return p.version
}

// send delivers a message as it is; call with mu held, or before anything runs.
func (p *fakePool) send(m *hearthv1.WatchResponse) {
	for s := range p.streams {
		s <- m
	}
}

// lose makes poolmanager go away, or come back.
func (p *fakePool) lose(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
	if down {
		for s := range p.streams {
			close(s)
			delete(p.streams, s)
		}
	}
}

// awaitReport blocks until a report that pleases has come, and returns it.
func (p *fakePool) awaitReport(t testing.TB, pleases func(*hearthv1.ReportRequest) bool) *hearthv1.ReportRequest {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	limit := time.After(patience)
	for seen := 0; ; {
		for ; seen < len(p.reports); seen++ {
			if pleases(p.reports[seen]) {
				return p.reports[seen]
			}
		}
		changed := p.changed
		p.mu.Unlock()
		select {
		case <-changed:
		case <-limit:
			p.mu.Lock()
			t.Fatal("no such report came")
		}
		p.mu.Lock()
	}
}

func loadOf(r *hearthv1.ReportRequest, name string) *hearthv1.Load {
	for _, l := range r.GetLoads() {
		if l.GetFunction() == name {
			return l
		}
	}
	return nil
}

// world is a gateway with all around it.
type world struct {
	t      testing.TB
	net    network
	pool   *fakePool
	gw     *gateway.Gateway
	addr   string
	client *http.Client
	stop   func() error // ends the gateway, once
	cutOff bool         // requests are expected to be in flight at the end
	ids    atomic.Int64
}

func newWorld(t testing.TB, n network, change func(*gateway.Config)) *world {
	t.Helper()
	return newWorldOf(t, n, newFakePool(), change)
}

func newWorldOf(t testing.TB, n network, p *fakePool, change func(*gateway.Config)) *world {
	t.Helper()
	w := &world{t: t, net: n, pool: p}
	c := gateway.Config{Name: "gw-1", Pool: w.pool, Dial: n.dial, Patience: -1, Logger: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&c)
	}
	g, err := gateway.New(c)
	if err != nil {
		t.Fatal(err)
	}
	w.gw = g
	l := n.listen()
	w.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx, l) }()
	w.client = &http.Client{Transport: w.transport()}
	w.stop = sync.OnceValue(func() error {
		w.client.CloseIdleConnections()
		cancel()
		return <-ended
	})
	t.Cleanup(func() {
		if err := w.stop(); err != nil && !w.cutOff {
			t.Errorf("run: %v", err)
		}
	})
	return w
}

func (w *world) transport() *http.Transport {
	return &http.Transport{
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return w.net.dial(ctx, "tcp", w.addr) },
		MaxIdleConnsPerHost: 2000, DisableCompression: true,
	}
}

// deploy makes a function known, with instances that serve h.
func (w *world) deploy(name string, scaling *hearthv1.Scaling, timeout time.Duration, instances ...*hearthv1.Instance) {
	w.t.Helper()
	w.pool.set(name, func(e *hearthv1.Endpoints) {
		e.Spec.Scaling = scaling
		if timeout > 0 {
			e.Spec.Timeout = durationpb.New(timeout)
		}
		e.Instances = instances
	})
	w.settle()
}

// settle returns when the gateway has acted upon all events so far.
func (w *world) settle() {
	w.t.Helper()
	<-w.gw.Synced()
	w.pool.mu.Lock()
	version := w.pool.version
	w.pool.mu.Unlock()
	eventually(w.t, "the gateway follows events", func() bool { return w.gw.Acked() >= version })
}

func (w *world) awaitQueue(name string, n int) {
	w.t.Helper()
	eventually(w.t, fmt.Sprintf("%d requests wait for %s", n, name), func() bool { return w.gw.Queued(name) == n })
}

// patience is for what another goroutine brings about, on whatever machine; a test that needs all of it has failed.
const patience = 2 * time.Minute

// eventually polls for what nothing can be waited on for.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for limit := time.Now().Add(patience); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		if holds() {
			return
		}
	}
	t.Fatalf("in vain: %s", what)
}

// instance starts a server and names it as an Instance that serves. Once kill has returned its connections are broken off, and new ones
// are refused: also if the server had not begun to serve, so that closing it alone would leave its listener open for a while.
func (w *world) instance(h http.Handler) (in *hearthv1.Instance, kill func()) {
	w.t.Helper()
	l := w.net.listen()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: h, Protocols: protocols}
	ended := make(chan struct{})
	go func() { _ = s.Serve(l); close(ended) }()
	kill = func() {
		_ = s.Close()
		<-ended
	}
	w.t.Cleanup(func() {
		_ = w.stop()
		kill()
	})
	return &hearthv1.Instance{Id: fmt.Sprintf("i-%d", w.ids.Add(1)), Address: l.Addr().String(), State: hearthv1.State_STATE_SERVING}, kill
}

// answer is a response read to its end.
type answer struct {
	status int
	header http.Header
	body   string
	err    error
}

func (a answer) reason(t testing.TB) (code, reason, next string) {
	t.Helper()
	var e struct {
		Error    string `json:"error"`
		Reason   string `json:"reason"`
		NextStep string `json:"next_step"`
	}
	if err := json.Unmarshal([]byte(a.body), &e); err != nil {
		t.Fatalf("body %q (status %d): %v", a.body, a.status, err)
	}
	return e.Error, e.Reason, e.NextStep
}

func (w *world) get(path string) answer { return w.do(w.request("GET", path, nil)) }

func (w *world) request(method, path string, body io.Reader) *http.Request {
	req, err := http.NewRequest(method, "http://gateway"+path, body)
	if err != nil {
		w.t.Fatal(err)
	}
	return req
}

func (w *world) do(req *http.Request) answer {
	res, err := w.client.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return answer{status: res.StatusCode, header: res.Header, body: string(body), err: err}
}

func allocated(in *hearthv1.Instance) *hearthv1.AllocateResponse {
	return &hearthv1.AllocateResponse{Instance: in}
}
