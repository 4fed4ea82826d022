package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/gateway"
)

// served is a fakePool behind RPC.
type served struct {
	hearthv1connect.UnimplementedAllocationServiceHandler
	pool *fakePool
}

func (s served) Allocate(ctx context.Context, req *connect.Request[hearthv1.AllocateRequest]) (*connect.Response[hearthv1.AllocateResponse], error) {
	res, err := s.pool.Allocate(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (s served) Watch(ctx context.Context, req *connect.Request[hearthv1.WatchRequest], out *connect.ServerStream[hearthv1.WatchResponse]) error {
	return s.pool.Watch(ctx, req.Msg.GetSubscriber(), func(m *hearthv1.WatchResponse) { _ = out.Send(m) })
}

func (s served) Report(ctx context.Context, req *connect.Request[hearthv1.ReportRequest]) (*connect.Response[hearthv1.ReportResponse], error) {
	return connect.NewResponse(&hearthv1.ReportResponse{}), s.pool.Report(ctx, req.Msg)
}

// The whole way: a gateway whose poolmanager is at the other end of RPC.
func TestRemote(t *testing.T) {
	p := newFakePool()
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewAllocationServiceHandler(served{pool: p}))
	mux.Handle(hearthv1connect.NewLoadServiceHandler(served{pool: p}))
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	registry := prometheus.NewRegistry()
	w := newWorldOf(t, loopback{t}, p, func(c *gateway.Config) {
		c.Pool, c.Registerer = gateway.NewRemote(server.Client(), server.URL), registry
	})
	in, _ := w.instance(mirror{"a"})
	p.allocate = func(_ context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		if req.GetFunction() == "fails" {
			return nil, connect.NewError(connect.CodeInternal, errors.New("no such file"))
		}
		return allocated(in), nil
	}
	w.deploy("works", nil, 0)
	w.deploy("fails", nil, 0)
	w.deploy("goes", nil, 0)
	if r := mirrored(t, w.get("/fn/works")); r.Instance != "a" {
		t.Errorf("%+v", r)
	}
	a := w.get("/fn/fails")
	if code, reason, _ := a.reason(t); a.status != 503 || code != "start_failed" || reason != "fails: no such file" {
		t.Errorf("%d %s", a.status, a.body)
	}
	p.awaitReport(t, func(r *hearthv1.ReportRequest) bool { return loadOf(r, "works") != nil })
	mirrored(t, w.get("/fn/goes"))
	w.get("/fn/stranger")
	p.set("goes", func(e *hearthv1.Endpoints) { e.Deleted = true })
	w.settle()
	want := map[string]float64{"works 200": 1, "fails 503": 1, " 404": 1}
	eventually(t, fmt.Sprintf("the series are %v", want), func() bool { // an answer is counted when it has ended, which its client knows first
		return maps.Equal(requestSeries(t, registry), want)
	})
	server.CloseClientConnections()
}

func requestSeries(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		if f.GetName() != "hearth_gateway_requests_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() { // code before function
				labels = append([]string{l.GetValue()}, labels...)
			}
			out[strings.Join(labels, " ")] = m.GetCounter().GetValue()
		}
	}
	return out
}

// An Instance that a reply named is kept against an event that was made before it served, but not for ever.
func TestReplyAgainstEvents(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		first, _ := w.instance(mirror{"first"})
		second, _ := w.instance(mirror{"second"})
		w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			if w.pool.allocates.Load() == 1 {
				return allocated(first), nil
			}
			return allocated(second), nil
		}
		w.deploy("f", nil, 0)
		for range 2 { // the second is the event
			if r := mirrored(t, w.get("/fn/f")); r.Instance != "first" {
				t.Errorf("served by %s", r.Instance)
			}
			w.pool.set("f", func(*hearthv1.Endpoints) {})
			w.settle()
		}
		time.Sleep(2 * time.Second)
		if r := mirrored(t, w.get("/fn/f")); r.Instance != "second" {
			t.Errorf("later served by %s", r.Instance)
		}
		second.State = hearthv1.State_STATE_SERVING
		w.pool.set("f", func(e *hearthv1.Endpoints) { e.Instances = []*hearthv1.Instance{second} })
		w.settle()
		time.Sleep(time.Hour)
		if r := mirrored(t, w.get("/fn/f")); r.Instance != "second" || w.pool.allocates.Load() != 2 {
			t.Errorf("at last served by %s", r.Instance)
		}
	})
}
