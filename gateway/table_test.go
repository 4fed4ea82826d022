package gateway_test

import (
	"context"
	"net/http"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func TestNothingKnownYet(t *testing.T) {
	p := newFakePool()
	p.down = true
	w := newWorldOf(t, loopback{t}, p, nil)
	a := w.get("/fn/hello")
	if code, _, _ := a.reason(t); a.status != 503 || code != "starting" || a.header.Get("Retry-After") == "" {
		t.Errorf("%d %s", a.status, a.body)
	}
	in, _ := w.instance(mirror{"a"})
	p.set("hello", func(e *hearthv1.Endpoints) { e.Instances = []*hearthv1.Instance{in} })
	p.lose(false)
	w.settle()
	if a := w.get("/fn/hello"); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// What is known stays known while poolmanager is away; what was deleted meanwhile goes when it is back.
func TestPoolManagerAway(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	in, _ := w.instance(mirror{"a"})
	w.deploy("stays", nil, 0, in)
	w.deploy("goes", nil, 0, in)
	w.pool.lose(true)
	for range 50 {
		if a := w.get("/fn/stays"); a.status != 200 {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	w.pool.mu.Lock()
	delete(w.pool.functions, "goes")
	w.pool.mu.Unlock()
	w.pool.lose(false)
	eventually(t, "the deletion is learnt", func() bool { return w.get("/fn/goes").status == 404 })
	if a := w.get("/fn/stays"); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	told := int64(0) // in one report, or in two if one was being made when poolmanager came back
	w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool {
		told += loadOf(r, "stays").GetRequests()
		return told >= 50
	})
}

// Events that are not newer change nothing, and a deleted Function stays dead.
func TestVersionsAndTombstones(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	a, _ := w.instance(mirror{"a"})
	b, _ := w.instance(mirror{"b"})
	w.deploy("f", nil, 0, a)
	w.deploy("f", nil, 0, b)
	old := &hearthv1.Endpoints{Function: "f", Version: 1, Spec: &hearthv1.FunctionSpec{}, Instances: []*hearthv1.Instance{a}}
	replay := func(e *hearthv1.Endpoints) {
		w.pool.mu.Lock()
		w.pool.send(endpointsEvent(e))
		w.pool.mu.Unlock()
		w.pool.set("after", func(*hearthv1.Endpoints) {})
		w.settle()
	}
	replay(old)
	if r := mirrored(t, w.get("/fn/f")); r.Instance != "b" {
		t.Errorf("an older event brought %s back", r.Instance)
	}
	version := w.pool.set("f", func(e *hearthv1.Endpoints) { e.Deleted = true })
	w.settle()
	old.Version = version - 1
	replay(old)
	if a := w.get("/fn/f"); a.status != 404 {
		t.Errorf("deleted: %d", a.status)
	}
	replay(&hearthv1.Endpoints{Function: "f", Version: version - 1, Deleted: true})
	replay(&hearthv1.Endpoints{Function: "Not A Label", Version: version + 100})
	w.pool.mu.Lock()
	w.pool.version += 200
	w.pool.mu.Unlock()
	w.pool.set("f", func(e *hearthv1.Endpoints) { e.Deleted = false; e.Instances = []*hearthv1.Instance{a} })
	w.settle()
	if r := mirrored(t, w.get("/fn/f")); r.Instance != "a" {
		t.Errorf("made again: %+v", r)
	}
}

// An Allocate reply that comes after the event in which its Instance left does not bring it back.
func TestLateReply(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	left, _ := w.instance(mirror{"left"})
	fresh, _ := w.instance(mirror{"fresh"})
	w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		if w.pool.allocates.Load() > 1 {
			return allocated(fresh), nil
		}
		draining := &hearthv1.Instance{Id: left.GetId(), Address: left.GetAddress(), State: hearthv1.State_STATE_DRAINING}
		w.pool.set("late", func(e *hearthv1.Endpoints) { e.Instances = []*hearthv1.Instance{draining} })
		w.settle()
		return allocated(left), nil
	}
	w.deploy("late", nil, 0)
	if r := mirrored(t, w.get("/fn/late")); r.Instance != "fresh" {
		t.Errorf("served by %s", r.Instance)
	}
}

// Deleting a Function tells those who wait, and lets those in flight end.
func TestDeleteWhileServing(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	hold, entered := make(chan struct{}), make(chan struct{}, 1)
	in, _ := w.instance(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { entered <- struct{}{}; <-hold }))
	w.deploy("f", &hearthv1.Scaling{Concurrency: 1, Max: 1}, time.Minute, in)
	answers := make(chan answer, 2)
	go func() { answers <- w.get("/fn/f") }()
	<-entered
	go func() { answers <- w.get("/fn/f") }()
	w.awaitQueue("f", 1)
	version := w.pool.set("f", func(e *hearthv1.Endpoints) { e.Deleted = true })
	if a := <-answers; a.status != 404 {
		t.Errorf("waiting: %d", a.status)
	}
	w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool {
		return r.GetVersion() >= version && loadOf(r, "f").GetInFlight()[in.GetId()] == 1
	})
	close(hold)
	if a := <-answers; a.status != 200 {
		t.Errorf("in flight: %d", a.status)
	}
}

// A report that acknowledges a version names every request in flight: what it left out would count as idle, and its Instance could
// be discarded with a request in it. The first request of another Function makes a report that leaves out the rest.
func TestUrgentReportsAcknowledgeNothing(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	hold, entered := make(chan struct{}), make(chan struct{}, 1)
	busy, _ := w.instance(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { entered <- struct{}{}; <-hold }))
	w.deploy("busy", &hearthv1.Scaling{Concurrency: 1, Max: 1}, time.Minute, busy)
	idle, _ := w.instance(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	w.deploy("idle", &hearthv1.Scaling{Concurrency: 1, Max: 1}, time.Minute, idle)
	answered := make(chan answer, 1)
	go func() { answered <- w.get("/fn/busy") }()
	<-entered
	version := w.pool.set("busy", func(*hearthv1.Endpoints) {})
	w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool { return r.GetVersion() >= version })
	if a := w.get("/fn/idle"); a.status != 200 {
		t.Fatalf("idle: %d", a.status)
	}
	w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool {
		if r.GetVersion() >= version && loadOf(r, "busy").GetInFlight()[busy.GetId()] != 1 {
			t.Errorf("version %d is acknowledged without the request in flight", r.GetVersion())
		}
		return loadOf(r, "idle").GetRequests() > 0
	})
	close(hold)
	<-answered
}
