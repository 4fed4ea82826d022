package gateway_test

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/gateway"
)

// timed runs a test in a bubble of its own time, over pipes. The bubble's end also shows that no goroutine is left.
func timed(t *testing.T, change func(*gateway.Config), test func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newWorld(t, newPipes(), change)) })
}

func TestDeadlineInQueue(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		w.pool.allocate = func(ctx context.Context, _ *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		w.deploy("f", nil, 3*time.Second)
		for _, req := range []*http.Request{w.request("GET", "/fn/f", nil), w.request("POST", "/fn/f", strings.NewReader("body"))} {
			begun := time.Now()
			a := w.do(req)
			code, reason, next := a.reason(t)
			if took := time.Since(begun); a.status != 504 || code != "timeout" || next == "" || !strings.Contains(reason, "no instance") || took.Round(100*time.Millisecond) != 3*time.Second {
				t.Errorf("%d %s after %s", a.status, a.body, took)
			}
		}
		if n := w.pool.allocates.Load(); n != 1 {
			t.Errorf("%d activations: the first outlives its request, and is the second's", n)
		}
	})
}

func TestDeadlineToFirstByte(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		in, _ := w.instance(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				<-r.Context().Done()
				return
			}
			rw.WriteHeader(200)
			_ = http.NewResponseController(rw).Flush()
			time.Sleep(10 * time.Second) // the answer may take as long as it likes
			_, _ = rw.Write([]byte("done"))
		}))
		w.deploy("f", nil, 3*time.Second, in)
		a := w.get("/fn/f/slow")
		if code, _, _ := a.reason(t); a.status != 504 || code != "timeout" {
			t.Errorf("%d %s", a.status, a.body)
		}
		if a := w.get("/fn/f/fast"); a.status != 200 || a.body != "done" || a.err != nil {
			t.Errorf("%d %q %v", a.status, a.body, a.err)
		}
	})
}

// One dial time-out does not put the only endpoint away; three do, and then another is asked for.
func TestDialTimeouts(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		deaf := &hearthv1.Instance{Id: "deaf", Address: "deaf:1", State: hearthv1.State_STATE_SERVING}
		fresh, _ := w.instance(mirror{"fresh"})
		w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			return allocated(fresh), nil
		}
		w.deploy("f", &hearthv1.Scaling{Max: 1}, 0, deaf)
		begun := time.Now()
		r := mirrored(t, w.get("/fn/f"))
		if took := time.Since(begun).Round(100 * time.Millisecond); r.Instance != "fresh" || took != 4500*time.Millisecond {
			t.Errorf("%s after %s", r.Instance, took)
		}
	})
}

// A restart of poolmanager is waited out, with one id for one claim.
func TestPatience(t *testing.T) {
	timed(t, func(c *gateway.Config) { c.Patience = 0 }, func(t *testing.T, w *world) {
		in, _ := w.instance(mirror{"a"})
		ids := map[string]bool{}
		back := time.Now().Add(2 * time.Second)
		w.pool.allocate = func(_ context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			ids[req.GetId()] = true
			if time.Now().Before(back) {
				return nil, errDown
			}
			return allocated(in), nil
		}
		w.deploy("f", nil, 0)
		if a := w.get("/fn/f"); a.status != 200 || len(ids) != 1 {
			t.Errorf("%d %s, %d ids", a.status, a.body, len(ids))
		}
	})
}

// A Function that cannot start is tried again and again, ever more slowly, one Instance at a time.
func TestFailingStartsBackOff(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			return nil, connect.NewError(connect.CodeInternal, errors.New("crashed"))
		}
		w.deploy("f", &hearthv1.Scaling{Concurrency: 1, Max: 10}, 0)
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		defer cancel()
		var clients sync.WaitGroup
		for range 20 {
			clients.Go(func() {
				for ctx.Err() == nil {
					if a := w.do(w.request("GET", "/fn/f", nil).WithContext(ctx)); a.err == nil && a.status != 503 {
						t.Errorf("%d %s", a.status, a.body)
					}
				}
			})
		}
		clients.Wait()
		if n := w.pool.allocates.Load(); n > 45 {
			t.Errorf("%d attempts in a minute", n)
		}
	})
}

// Load is the time average, reported each second, soon for the first request, and kept while it cannot be delivered.
func TestLoadReports(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		in, _ := w.instance(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { time.Sleep(500 * time.Millisecond) }))
		w.deploy("f", nil, 0, in)
		time.Sleep(3*time.Second + 100*time.Millisecond)
		synctest.Wait()
		w.pool.mu.Lock()
		last := w.pool.reports[len(w.pool.reports)-1]
		w.pool.reports = nil
		w.pool.mu.Unlock()
		if l := loadOf(last, "f"); l == nil || l.GetConcurrency() != 0 || l.GetRequests() != 0 || last.GetSubscriber() != "gw-1" {
			t.Errorf("an idle function with an instance: %v", last)
		}
		begun := time.Now()
		go w.get("/fn/f")
		first := w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool { return loadOf(r, "f") != nil })
		if l := loadOf(first, "f"); time.Since(begun) > 50*time.Millisecond || l.GetRequests() != 1 || l.GetInFlight()[in.GetId()] != 1 {
			t.Errorf("first request: %v after %s", first, time.Since(begun))
		}
		areaOf := func(l *hearthv1.Load) float64 { return l.GetConcurrency() * l.GetInterval().AsDuration().Seconds() }
		w.pool.lose(true)
		time.Sleep(10 * time.Second)
		w.pool.lose(false)
		late := w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool {
			l := loadOf(r, "f")
			return l.GetInterval().AsDuration() > 5*time.Second
		})
		l := loadOf(late, "f")
		if area := areaOf(loadOf(first, "f")) + areaOf(l); math.Abs(area-0.5) > 0.01 || l.GetRequests() != 0 {
			t.Errorf("half a second of one request: area %f, %v", area, l)
		}
	})
}

// Fifty clients, and Instances that come and go by the protocol: no request is lost, and no Instance has too many.
func TestDrainsLoseNothing(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		const clients, concurrency, rounds = 50, 4, 20
		var served, surplus atomic.Int64
		fresh := func() (*hearthv1.Instance, func()) {
			var here atomic.Int64
			return w.instance(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
				if here.Add(1) > concurrency {
					surplus.Add(1)
				}
				time.Sleep(time.Duration(1+rand.N(200)) * time.Millisecond)
				_, _ = rw.Write([]byte("ok"))
				here.Add(-1)
				served.Add(1)
			}))
		}
		kills := map[string]func(){}
		var instances []*hearthv1.Instance
		for range 8 {
			in, kill := fresh()
			kills[in.GetId()] = kill
			instances = append(instances, in)
		}
		w.deploy("f", &hearthv1.Scaling{Concurrency: concurrency, Max: 8}, 0, instances...)
		ctx, stop := context.WithCancel(t.Context())
		var load sync.WaitGroup
		for i := range clients {
			load.Go(func() {
				for ctx.Err() == nil {
					req := w.request([]string{"GET", "POST"}[i%2], "/fn/f", nil)
					if i%4 == 1 {
						req = w.request("POST", "/fn/f", strings.NewReader("some body"))
					}
					if a := w.do(req); a.status != 200 || a.body != "ok" || a.err != nil {
						t.Errorf("%d %q %v", a.status, a.body, a.err)
					}
				}
			})
		}
		for range rounds {
			time.Sleep(rand.N(300 * time.Millisecond))
			i := rand.N(len(instances))
			in := instances[i]
			in.State = hearthv1.State_STATE_DRAINING
			version := w.pool.set("f", func(e *hearthv1.Endpoints) { e.Instances = instances })
			w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool {
				return r.GetVersion() >= version && loadOf(r, "f").GetInFlight()[in.GetId()] == 0
			})
			kills[in.GetId()]() // as hard as can be
			next, kill := fresh()
			kills[next.GetId()] = kill
			instances[i] = next
			w.pool.set("f", func(e *hearthv1.Endpoints) { e.Instances = instances })
		}
		stop()
		load.Wait()
		if surplus.Load() > 0 || served.Load() < 1000 {
			t.Errorf("%d requests beyond an instance's concurrency, %d served", surplus.Load(), served.Load())
		}
	})
}

// Instances that die without a word: requests on them break, no other does.
func TestInstancesDieInMidTraffic(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		var mu sync.Mutex
		var living []func() // ends one
		fresh := func() *hearthv1.Instance {
			in, kill := w.instance(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
				time.Sleep(100 * time.Millisecond)
				_, _ = rw.Write([]byte("ok"))
			}))
			mu.Lock()
			living = append(living, kill)
			mu.Unlock()
			return in
		}
		w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			time.Sleep(100 * time.Millisecond)
			return allocated(fresh()), nil
		}
		w.deploy("f", &hearthv1.Scaling{Concurrency: 5, Max: 4}, 0)
		ctx, stop := context.WithCancel(t.Context())
		var load sync.WaitGroup
		var ok, broke atomic.Int64
		for range 20 {
			load.Go(func() {
				for ctx.Err() == nil {
					switch a := w.get("/fn/f"); {
					case a.status == 200 && a.err == nil:
						ok.Add(1)
					case a.status == 502:
						broke.Add(1)
					default:
						t.Errorf("%d %q %v", a.status, a.body, a.err)
					}
				}
			})
		}
		const deaths = 20
		for range deaths {
			time.Sleep(time.Second)
			mu.Lock()
			kill := living[0]
			living = living[1:]
			mu.Unlock()
			kill()
		}
		stop()
		load.Wait()
		if broke.Load() > deaths*5 || ok.Load() < 1000 {
			t.Errorf("%d ok, %d broke", ok.Load(), broke.Load())
		}
	})
}

// Told to stop, the gateway finishes what it has begun, the queue included, and reports once more.
func TestGracefulEnd(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		in, _ := w.instance(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			time.Sleep(5 * time.Second)
			_, _ = rw.Write([]byte("ok"))
		}))
		w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			time.Sleep(5 * time.Second)
			return allocated(in), nil
		}
		w.deploy("f", &hearthv1.Scaling{Concurrency: 1, Max: 1}, 0)
		answers := make(chan answer, 2)
		for range 2 {
			go func() { answers <- w.get("/fn/f") }()
		}
		time.Sleep(time.Second)
		if err := w.stop(); err != nil {
			t.Error(err)
		}
		for range 2 {
			if a := <-answers; a.status != 200 || a.body != "ok" {
				t.Errorf("%d %q %v", a.status, a.body, a.err)
			}
		}
		w.pool.mu.Lock()
		defer w.pool.mu.Unlock()
		if l := loadOf(w.pool.reports[len(w.pool.reports)-1], "f"); len(l.GetInFlight()) != 0 || l.GetQueued() != 0 {
			t.Errorf("last report: %v", l)
		}
	})
}

func TestEndIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), nil)
		w.cutOff = true
		in, kill := w.instance(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		w.deploy("f", nil, time.Hour, in)
		done := make(chan answer)
		go func() { done <- w.get("/fn/f") }()
		time.Sleep(time.Second)
		begun := time.Now()
		err := w.stop()
		if took := time.Since(begun); err == nil || took > 30*time.Second {
			t.Errorf("%v after %s", err, took)
		}
		<-done
		kill()
	})
}
