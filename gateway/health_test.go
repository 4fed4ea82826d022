package gateway_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
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

// breaker answers as mirror does, until it is told to break connections off before a byte of an answer.
type breaker struct {
	broken atomic.Bool
	seen   atomic.Int64
}

func (b *breaker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.seen.Add(1)
	if b.broken.Load() {
		_, _ = io.Copy(io.Discard, r.Body)
		panic(http.ErrAbortHandler)
	}
	_, _ = io.WriteString(w, "well")
}

func replies(w *world) {
	w.pool.allocate = func(ctx context.Context, _ *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
}

func TestRefusedInstanceIsReleased(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		dead, kill := w.instance(mirror{"dead"})
		well, _ := w.instance(mirror{"well"})
		kill()
		w.deploy("f", nil, 0, dead, well)
		for range 4 {
			if r := mirrored(t, w.do(w.request("POST", "/fn/f", strings.NewReader("body")))); r.Instance != "well" {
				t.Errorf("answered by %s", r.Instance)
			}
		}
		time.Sleep(time.Second)
		if got := w.pool.gaveBack(); !slices.Equal(got, []string{dead.GetId()}) {
			t.Errorf("released %v, want %s alone", got, dead.GetId())
		}
	})
}

// An Instance that refuses once and is there again a moment later is kept.
func TestRefusalIsLookedInto(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		n := w.net.(*pipes)
		in, _ := w.instance(mirror{"a"})
		l := n.hide(in.GetAddress())
		w.deploy("f", nil, 10*time.Second, in)
		replies(w)
		time.AfterFunc(150*time.Millisecond, func() { n.show(in.GetAddress(), l) })
		begun := time.Now()
		if r := mirrored(t, w.get("/fn/f")); r.Instance != "a" || time.Since(begun) > 500*time.Millisecond {
			t.Errorf("%s after %s", r.Instance, time.Since(begun))
		}
		time.Sleep(time.Minute)
		if got := w.pool.gaveBack(); len(got) != 0 {
			t.Errorf("released %v", got)
		}
	})
}

// A broken connection takes the Instance out while there is another; what is safe to run twice is, and only once more.
func TestBrokenConnection(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		b := &breaker{}
		b.broken.Store(true)
		sick, _ := w.instance(b)
		well, _ := w.instance(mirror{"well"})
		w.deploy("f", nil, 0, sick, well)
		for range 5 {
			if r := mirrored(t, w.get("/fn/f")); r.Instance != "well" {
				t.Errorf("answered by %s", r.Instance)
			}
		}
		if n := b.seen.Load(); n != 1 {
			t.Errorf("the sick one got %d requests, want the first alone", n)
		}
	})
	timed(t, nil, func(t *testing.T, w *world) {
		a, b := &breaker{}, &breaker{}
		a.broken.Store(true)
		b.broken.Store(true)
		one, _ := w.instance(a)
		two, _ := w.instance(b)
		w.deploy("f", nil, 0, one, two)
		for method, want := range map[string]int64{"GET": 2, "POST": 1} {
			before := a.seen.Load() + b.seen.Load()
			got := w.do(w.request(method, "/fn/f", strings.NewReader(map[string]string{"POST": "x"}[method])))
			if code, _, _ := got.reason(t); got.status != http.StatusBadGateway || code != "instance_broke" {
				t.Errorf("%s: %d %s", method, got.status, got.body)
			}
			if n := a.seen.Load() + b.seen.Load() - before; n != want {
				t.Errorf("%s: it was tried %d times, want %d", method, n, want)
			}
		}
	})
}

func TestThreeBreaksInARowRelease(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		b := &breaker{}
		in, _ := w.instance(b)
		w.deploy("f", nil, 0, in)
		post := func(broken bool) {
			b.broken.Store(broken)
			w.do(w.request("POST", "/fn/f", strings.NewReader("x")))
			time.Sleep(2 * time.Second) // the connection is not kept for longer
		}
		for range 3 { // an answer between them wipes the slate
			post(true)
			post(true)
			post(false)
		}
		if got := w.pool.gaveBack(); len(got) != 0 {
			t.Fatalf("released %v", got)
		}
		replies(w)
		post(true)
		post(true)
		post(true)
		if got := w.pool.gaveBack(); !slices.Equal(got, []string{in.GetId()}) {
			t.Errorf("released %v", got)
		}
	})
}

func TestLateInstanceIsReleased(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		var hangs atomic.Bool
		in, _ := w.instance(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if hangs.Load() {
				<-r.Context().Done()
			}
		}))
		w.deploy("f", nil, 3*time.Second, in)
		replies(w)
		hang := func(yes bool) { hangs.Store(yes); w.get("/fn/f") }
		for _, yes := range []bool{true, true, false, true, true} {
			hang(yes)
		}
		synctest.Wait()
		if got := w.pool.gaveBack(); len(got) != 0 {
			t.Fatalf("released %v after two in a row", got)
		}
		hang(true)
		synctest.Wait()
		if got := w.pool.gaveBack(); !slices.Equal(got, []string{in.GetId()}) {
			t.Errorf("released %v", got)
		}
	})
}

// When what they all depend on is down, not all Instances are replaced at once.
func TestReleasesAreSpread(t *testing.T) {
	timed(t, nil, func(t *testing.T, w *world) {
		var all []*hearthv1.Instance
		for range 5 {
			in, _ := w.instance(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
			all = append(all, in)
		}
		w.deploy("f", nil, time.Second, all...)
		replies(w)
		var clients sync.WaitGroup
		for range 50 {
			clients.Go(func() { w.get("/fn/f") })
		}
		clients.Wait()
		synctest.Wait()
		if got := w.pool.gaveBack(); len(got) != 1 {
			t.Errorf("released %v within a second", got)
		}
	})
}

// Nothing of this is the Instance's fault.
func TestHealthyInstanceIsKept(t *testing.T) {
	for name, misuse := range map[string]func(*testing.T, *world){
		"clients that leave": func(t *testing.T, w *world) {
			for range 10 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				w.do(w.request("GET", "/fn/f/hang", nil).WithContext(ctx))
				cancel()
			}
		},
		"the function's own errors": func(t *testing.T, w *world) {
			for range 10 {
				if a := w.get("/fn/f/500"); a.status != 500 {
					t.Errorf("status %d", a.status)
				}
			}
		},
		"bodies that are sent too slowly": func(t *testing.T, w *world) {
			for range 5 {
				r, stop := io.Pipe()
				time.AfterFunc(4*time.Second, func() { _ = stop.Close() }) // the time-out is 3 s
				if a := w.do(w.request("POST", "/fn/f/read", r)); a.status != 504 {
					t.Errorf("%d %s", a.status, a.body)
				}
			}
		},
		"bodies that break off": func(t *testing.T, w *world) {
			for range 5 {
				r, stop := io.Pipe()
				time.AfterFunc(time.Second, func() { _ = stop.CloseWithError(io.ErrUnexpectedEOF) })
				w.do(w.request("POST", "/fn/f/read", r))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			timed(t, nil, func(t *testing.T, w *world) {
				in, _ := w.instance(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
					switch r.URL.Path {
					case "/hang":
						<-r.Context().Done()
					case "/read":
						_, _ = io.Copy(io.Discard, r.Body)
					case "/500":
						rw.WriteHeader(500)
					}
				}))
				w.deploy("f", nil, 3*time.Second, in)
				misuse(t, w)
				begun := time.Now()
				if a := w.get("/fn/f"); a.status != 200 || time.Since(begun) > time.Second {
					t.Errorf("%d %s after %s", a.status, a.body, time.Since(begun))
				}
				time.Sleep(time.Minute)
				if got := w.pool.gaveBack(); len(got) != 0 || w.pool.allocates.Load() != 0 {
					t.Errorf("released %v, %d activations", got, w.pool.allocates.Load())
				}
			})
		})
	}
}

// A frozen Instance comes back under another claim, by a reply or by an event, whichever is first.
func TestThawedInstanceIsBack(t *testing.T) {
	for _, first := range []string{"reply", "event"} {
		t.Run(first, func(t *testing.T) {
			timed(t, nil, func(t *testing.T, w *world) {
				in, _ := w.instance(mirror{"a"})
				in.Claim = &hearthv1.Claim{Id: "first"}
				thawed := &hearthv1.Instance{Id: in.GetId(), Address: in.GetAddress(), State: in.GetState(), Claim: &hearthv1.Claim{Id: "second"}}
				serve := func(all ...*hearthv1.Instance) { w.pool.set("f", func(e *hearthv1.Endpoints) { e.Instances = all }) }
				w.deploy("f", nil, 3*time.Second, in)
				mirrored(t, w.get("/fn/f"))
				drains := &hearthv1.Instance{Id: in.GetId(), Address: in.GetAddress(), State: hearthv1.State_STATE_DRAINING, Claim: in.GetClaim()}
				serve(drains)
				serve() // frozen
				w.settle()
				w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
					if first == "event" {
						serve(thawed)
						time.Sleep(time.Millisecond)
					}
					return allocated(thawed), nil
				}
				mirrored(t, w.get("/fn/f"))
				serve(thawed)
				w.settle()
				mirrored(t, w.get("/fn/f"))
				if n := w.pool.allocates.Load(); n != 1 {
					t.Errorf("%d activations", n)
				}
			})
		})
	}
}

// A request that waits for a connection to what has vanished goes elsewhere when its Instance is withdrawn, not when the time to connect is over.
func TestWithdrawalEndsDials(t *testing.T) {
	var vanished atomic.Value
	vanished.Store("")
	vanish := func(c *gateway.Config) {
		dial := c.Dial
		c.DialTime = time.Hour
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == vanished.Load() {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return dial(ctx, network, address)
		}
	}
	timed(t, vanish, func(t *testing.T, w *world) {
		old, _ := w.instance(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		next, _ := w.instance(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write([]byte("next")) }))
		w.deploy("f", nil, 0, old)
		vanished.Store(old.GetAddress())
		answers := make(chan answer, 1)
		begun := time.Now()
		go func() { answers <- w.get("/fn/f") }()
		synctest.Wait()
		time.Sleep(time.Second)
		w.pool.set("f", func(e *hearthv1.Endpoints) { e.Instances = []*hearthv1.Instance{next} })
		if got := <-answers; got.body != "next" || time.Since(begun) > 2*time.Second {
			t.Errorf("%d %q after %v", got.status, got.body, time.Since(begun))
		}
	})
}

// A vanished Instance fills its Function's maximum until poolmanager notices as well. Requests wait for that, and none is refused.
func TestVanishedInstanceFillsMaximum(t *testing.T) {
	var vanished atomic.Value
	vanished.Store("")
	vanish := func(c *gateway.Config) {
		dial := c.Dial
		c.DialTime = time.Second
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == vanished.Load() {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return dial(ctx, network, address)
		}
	}
	timed(t, vanish, func(t *testing.T, w *world) {
		old, _ := w.instance(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		next, _ := w.instance(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write([]byte("next")) }))
		var room atomic.Bool
		w.pool.keeps = true
		w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			if !room.Load() {
				return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("it has its maximum of 1"))
			}
			return allocated(next), nil
		}
		w.deploy("f", &hearthv1.Scaling{Max: 1, Concurrency: 10}, 20*time.Second, old)
		vanished.Store(old.GetAddress())
		answers := make(chan answer, 4)
		for range cap(answers) {
			go func() { answers <- w.get("/fn/f") }()
		}
		time.Sleep(5 * time.Second)
		if n := w.pool.allocates.Load(); n < 2 || len(answers) > 0 {
			t.Errorf("%d activations, %d answers before there is room", n, len(answers))
		}
		room.Store(true)
		begun := time.Now()
		w.pool.set("f", func(e *hearthv1.Endpoints) { e.Instances = nil })
		for range cap(answers) {
			if got := <-answers; got.body != "next" || time.Since(begun) > 100*time.Millisecond {
				t.Errorf("%d %q %v after there was room", got.status, got.body, time.Since(begun))
			}
		}
	})
}
