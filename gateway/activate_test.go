package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/gateway"
)

// counting serves until it is told to, and checks the limit that an instance may rely on.
type counting struct {
	now, most, served atomic.Int64
	hold              <-chan struct{} // nil does not hold
}

func (c *counting) ServeHTTP(http.ResponseWriter, *http.Request) {
	n := c.now.Add(1)
	defer c.now.Add(-1)
	for most := c.most.Load(); n > most && !c.most.CompareAndSwap(most, n); most = c.most.Load() {
	}
	c.served.Add(1)
	if c.hold != nil {
		<-c.hold
	}
}

// A thousand requests at once to a Function that has no Instance set off one activation for each ten of them, and no more.
func TestBurstFromZero(t *testing.T) {
	const requests, concurrency, needed = 1000, 10, 100
	// A dial takes as long as it takes: on a busy machine a time-out is the machine's doing.
	w := newWorld(t, loopback{t}, func(c *gateway.Config) { c.DialTime = time.Minute })
	open := make(chan struct{})
	var mu sync.Mutex
	var instances []*counting
	w.pool.allocate = func(ctx context.Context, _ *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		select {
		case <-open:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		c := &counting{}
		mu.Lock()
		instances = append(instances, c)
		mu.Unlock()
		in, _ := w.instance(c)
		return allocated(in), nil
	}
	w.deploy("burst", &hearthv1.Scaling{Concurrency: concurrency, Max: 500, Queue: requests}, 0)
	answers := make(chan answer, requests)
	for range requests {
		go func() { answers <- w.get("/fn/burst") }()
	}
	w.awaitQueue("burst", requests)
	eventually(t, "all activations begin", func() bool { return w.pool.allocates.Load() == needed })
	close(open)
	for range requests {
		if a := <-answers; a.status != 200 {
			t.Fatalf("status %d, body %q, err %v", a.status, a.body, a.err)
		}
	}
	if n := w.pool.allocates.Load(); n != needed {
		t.Errorf("%d activations, want %d", n, needed)
	}
	for i, c := range instances {
		if n := c.most.Load(); n > concurrency {
			t.Errorf("instance %d had %d requests at once", i, n)
		}
	}
}

// With one Instance of one slot, requests are served in the order in which they came, and the rest is refused.
func TestQueueIsFIFOAndBounded(t *testing.T) {
	const bound = 8
	w := newWorld(t, loopback{t}, nil)
	step := make(chan struct{})
	var mu sync.Mutex
	var order []string
	in, _ := w.instance(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		order = append(order, r.URL.Path)
		mu.Unlock()
		<-step
	}))
	w.deploy("one", &hearthv1.Scaling{Concurrency: 1, Max: 1, Queue: bound}, 0, in)
	var want []string
	answers := make(chan answer, bound+1)
	for i := range bound + 1 { // the first gets the slot
		path := fmt.Sprintf("/%d", i)
		want = append(want, path)
		go func() { answers <- w.get("/fn/one" + path) }()
		if i == 0 {
			eventually(t, "the first is served", func() bool { mu.Lock(); defer mu.Unlock(); return len(order) == 1 })
		}
		w.awaitQueue("one", i)
	}
	a := w.get("/fn/one/too-many")
	code, reason, next := a.reason(t)
	if a.status != http.StatusTooManyRequests || a.header.Get("Retry-After") == "" || code != "queue_full" || reason == "" || next == "" {
		t.Errorf("overflow: %d %v %s", a.status, a.header, a.body)
	}
	close(step)
	for range bound + 1 {
		if a := <-answers; a.status != 200 {
			t.Errorf("status %d %s", a.status, a.body)
		}
	}
	if !slices.Equal(order, want) {
		t.Errorf("served in order %v", order)
	}
	if n := w.pool.allocates.Load(); n != 0 {
		t.Errorf("%d activations beyond max", n)
	}
}

func TestAllocationFailures(t *testing.T) {
	long := strings.Repeat("x", 10000)
	for _, c := range []struct {
		err    error
		status int
		code   string
		reason string
	}{
		{connect.NewError(connect.CodeResourceExhausted, errors.New("pool is empty")), 503, "no_capacity", "pool is empty"},
		{connect.NewError(connect.CodeUnavailable, errors.New("no node")), 503, "pool_unavailable", "no node"},
		{connect.NewError(connect.CodeInternal, errors.New("exit status 3: no module named flask")), 503, "start_failed", "no module named flask"},
		{fmt.Errorf("wrapped: %w", connect.NewError(connect.CodeInternal, errors.New(long))), 503, "start_failed", "xxx"},
		{connect.NewError(connect.CodeDeadlineExceeded, errors.New("claim")), 503, "start_too_slow", "claim"},
		{connect.NewError(connect.CodeNotFound, errors.New("gone")), 404, "unknown_function", "fails"},
		{errors.New("connection refused"), 503, "pool_unavailable", "connection refused"},
	} {
		w := newWorld(t, loopback{t}, nil)
		w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			return nil, c.err
		}
		w.deploy("fails", &hearthv1.Scaling{Concurrency: 1}, 0)
		a := w.get("/fn/fails")
		code, reason, next := a.reason(t)
		if a.status != c.status || code != c.code || !strings.Contains(reason, c.reason) || next == "" || len(a.body) > 4096 {
			t.Errorf("%v: %d %s", c.err, a.status, a.body)
		}
		if (a.status == 503) != (a.header.Get("Retry-After") != "") {
			t.Errorf("%v: Retry-After %q", c.err, a.header.Get("Retry-After"))
		}
		_ = w.stop()
	}
}

func TestBadReplies(t *testing.T) {
	for _, in := range []*hearthv1.Instance{nil, {}, {Id: "x"}, {Id: "x", Address: "10.0.0.1"}, {Id: "x", Address: ":80"}, {Id: "x", Address: "a:0"}} {
		w := newWorld(t, loopback{t}, nil)
		w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			return allocated(in), nil
		}
		w.deploy("odd", nil, 0)
		if a := w.get("/fn/odd"); a.status != 503 {
			t.Errorf("%v: %d %s", in, a.status, a.body)
		}
		_ = w.stop()
	}
}

// Those who wait are served by whichever comes first: the Instance that is being started, or one that becomes free. A
// failed activation is no reason to refuse them while another Instance serves.
func TestFreedSlotServesTheQueue(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	asked := make(chan struct{}, 100)
	w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		asked <- struct{}{}
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("full"))
	}
	hold := make(chan struct{})
	c := &counting{hold: hold}
	in, _ := w.instance(c)
	w.deploy("busy", &hearthv1.Scaling{Concurrency: 1, Max: 5}, 0, in)
	answers := make(chan answer, 3)
	for range 3 {
		go func() { answers <- w.get("/fn/busy") }()
	}
	<-asked
	<-asked // tried again after a pause, not in a loop
	close(hold)
	for range 3 {
		if a := <-answers; a.status != 200 {
			t.Errorf("status %d %s", a.status, a.body)
		}
	}
	if c.most.Load() != 1 {
		t.Errorf("%d requests at once", c.most.Load())
	}
}

// A client that leaves gives up its place and its slot, with a body or without.
func TestClientLeaves(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	hold := make(chan struct{})
	entered := make(chan struct{}, 10)
	in, _ := w.instance(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		select {
		case <-r.Context().Done():
		case <-hold:
		}
	}))
	w.deploy("slow", &hearthv1.Scaling{Concurrency: 1, Max: 1}, 0, in)
	ctx, leave := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	for i := range 9 {
		method, body := "GET", ""
		if i%2 == 1 {
			method, body = "POST", strings.Repeat("b", 1000*i)
		}
		clients.Go(func() { w.do(w.request(method, "/fn/slow", strings.NewReader(body)).WithContext(ctx)) })
	}
	<-entered
	w.awaitQueue("slow", 8)
	leave()
	clients.Wait()
	w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool {
		l := loadOf(r, "slow")
		return l != nil && l.GetQueued() == 0 && len(l.GetInFlight()) == 0
	})
	close(hold)
	if a := w.get("/fn/slow"); a.status != 200 {
		t.Errorf("afterwards: %d %s", a.status, a.body)
	}
}

// A reply's Instance serves at once, long before any event tells of it; the later event changes nothing for it.
func TestTraceOfAStart(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	in, _ := w.instance(mirror{"a"})
	w.pool.allocate = func(_ context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		if req.GetId() == "" || time.Until(req.GetDeadline().AsTime()) < 30*time.Second {
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%v", req))
		}
		return &hearthv1.AllocateResponse{Instance: in, Phases: []*hearthv1.Phase{
			{Name: "claim", Duration: durationpb.New(time.Millisecond)},
			{Name: "fetch me", Offset: durationpb.New(time.Millisecond), Duration: durationpb.New(2 * time.Millisecond), Busy: durationpb.New(time.Millisecond)},
		}}, nil
	}
	w.deploy("traced", nil, 0)
	names := func(trace string) []string {
		req := w.request("GET", "/fn/traced", nil)
		req.Header.Set(gateway.TraceHeader, trace)
		a := w.do(req)
		phases, err := gateway.ParseTiming(a.header.Values("Server-Timing"))
		if err != nil || a.status != 200 {
			t.Fatalf("%d %v %v", a.status, a.header, err)
		}
		var names []string
		for _, p := range phases {
			names = append(names, p.Name)
		}
		return names
	}
	if got := names("1"); !slices.Equal(got, []string{"total", "queue", "allocate", "claim", "fetch_me", "first_byte"}) {
		t.Errorf("cold: %v", got)
	}
	if got := names("1"); !slices.Equal(got, []string{"total", "first_byte"}) {
		t.Errorf("warm: %v", got)
	}
	if got := names("0"); got != nil {
		t.Errorf("not asked for: %v", got)
	}
	if n := w.pool.allocates.Load(); n != 1 {
		t.Errorf("%d activations", n)
	}
}
