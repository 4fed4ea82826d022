package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

// TestDecide is the election as a table.
func TestDecide(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		name string
		term int64
		s    seen
		want move
	}{
		{"there is none", 0, seen{since: now}, take},
		{"it was released", 0, seen{version: "1", epoch: 3, since: now}, take},
		{"another leads", 0, seen{holder: "b", epoch: 3, since: now.Add(-leaseTime + 1)}, stay},
		{"another is silent", 0, seen{holder: "b", epoch: 3, since: now.Add(-leaseTime)}, take},
		{"we lead", 3, seen{holder: "a", epoch: 3, since: now}, renew},
		{"we lead and were late", 3, seen{holder: "a", epoch: 3, since: now.Add(-time.Hour)}, renew},
		{"the lease was deleted", 3, seen{since: now}, renew},
		{"another took over", 3, seen{holder: "b", epoch: 4, since: now}, stepDown},
		{"another took over and has gone", 3, seen{epoch: 4, since: now}, stepDown},
		{"our name, and a later term", 3, seen{holder: "a", epoch: 4, since: now}, stepDown},
		{"another made it anew", 3, seen{holder: "b", epoch: 1, since: now}, stepDown},
	} {
		if got := decide(now, "a", c.term, c.s); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// election is an API server in memory that candidates can be cut off from.
type election struct {
	t      *testing.T
	client client.WithWatch

	mu    sync.Mutex
	away  map[string]bool
	leads map[string]int64 // terms that are led now
	terms []int64          // in the order in which they began
}

func newElection(t *testing.T) *election {
	return &election{t: t, client: fake.NewClientBuilder().WithScheme(NewScheme()).Build(), away: map[string]bool{}, leads: map[string]int64{}}
}

var errAway = errors.New("connection refused")

// candidate runs one until it is stopped.
func (e *election) candidate(name string) (stop func()) {
	gone := func() error {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.away[name] {
			return errAway
		}
		return nil
	}
	api := interceptor.NewClient(e.client, interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			return errors.Join(gone(), c.Get(ctx, key, o, opts...))
		},
		Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
			if err := gone(); err != nil {
				return err
			}
			return c.Update(ctx, o, opts...)
		},
	})
	ctx, cancel := context.WithCancel(e.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		elector := &Elector{client: api, namespace: "hearth-system", identity: name, log: slog.New(slog.DiscardHandler)}
		for life := 0; ctx.Err() == nil; life++ {
			elector.identity = fmt.Sprint(name, "-", life) // a process that ends is started again
			_ = elector.Run(ctx, func(ctx context.Context, t *Term) error {
				e.set(name, t.Epoch)
				<-ctx.Done()
				e.set(name, 0)
				return nil
			})
		}
	}()
	return func() { cancel(); <-done }
}

func (e *election) set(name string, term int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if term == 0 {
		delete(e.leads, name)
		return
	}
	e.leads[name] = term
	if n := len(e.terms); n > 0 && e.terms[n-1] >= term {
		e.t.Errorf("term %d began after term %d", term, e.terms[n-1])
	}
	e.terms = append(e.terms, term)
}

func (e *election) cut(name string, away bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.away[name] = away
}

// leaders are those that lead now, with their terms.
func (e *election) leaders() string {
	synctest.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	return fmt.Sprint(e.leads)
}

func (e *election) want(want string) {
	e.t.Helper()
	if got := e.leaders(); got != want {
		e.t.Errorf("%s lead, want %s", got, want)
	}
}

// TestTakeOver: a standby leads within moments of the leader's end, and within the lease's time of its silence; never before, and always
// with a later term. A leader that comes back from silence steps down.
func TestTakeOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElection(t)
		stopA := e.candidate("a")
		time.Sleep(time.Second)
		stopB := e.candidate("b")
		defer stopB()
		time.Sleep(time.Minute)
		e.want("map[a:1]")
		stopA()
		time.Sleep(time.Second)
		e.want("map[b:2]")
		stopA = e.candidate("a")
		defer stopA()
		time.Sleep(time.Minute)
		e.want("map[b:2]")
		e.cut("b", true)
		time.Sleep(leaseTime - renewTime - lookTime)
		e.want("map[b:2]")
		time.Sleep(renewTime + 2*lookTime)
		e.want("map[a:3 b:2]") // the stale one's claims are refused by nodes
		e.cut("b", false)
		time.Sleep(time.Second)
		e.want("map[a:3]")
		time.Sleep(time.Minute)
		e.want("map[a:3]")
	})
}

// TestAPIAway: without the API server the leader leads on, for as long as that takes, and nobody else does.
func TestAPIAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElection(t)
		defer e.candidate("a")()
		time.Sleep(time.Second)
		defer e.candidate("b")()
		time.Sleep(time.Minute)
		e.cut("a", true)
		e.cut("b", true)
		time.Sleep(time.Hour)
		e.want("map[a:1]")
		e.cut("a", false)
		time.Sleep(time.Second)
		e.cut("b", false)
		time.Sleep(time.Minute)
		e.want("map[a:1]")
	})
}

// TestManyCandidates: of many that begin at once, one leads.
func TestManyCandidates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElection(t)
		for n := range 8 {
			defer e.candidate(fmt.Sprint("c", n))()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(e.leads) != 1 || len(e.terms) != 1 {
			t.Errorf("%v lead, terms %v", e.leads, e.terms)
		}
	})
}

// TestRaise: a term that nodes know a later one than is the last that its process leads, and the next is later than theirs.
func TestRaise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElection(t)
		elector := &Elector{client: e.client, namespace: "hearth-system", identity: "a", log: slog.New(slog.DiscardHandler)}
		err := elector.Run(t.Context(), func(ctx context.Context, term *Term) error { return term.raise(ctx, 41) })
		if err != nil {
			t.Fatal(err)
		}
		elector.identity = "a-1"
		ctx, cancel := context.WithCancel(t.Context())
		err = elector.Run(ctx, func(_ context.Context, term *Term) error {
			if cancel(); term.Epoch != 42 {
				t.Errorf("term %d follows 41", term.Epoch)
			}
			return term.raise(t.Context(), maxEpoch+1)
		})
		if err == nil {
			t.Error("a number that can be no term's was taken")
		}
	})
}

// FuzzLease: whatever is in the Lease is a term's number or an error.
func FuzzLease(f *testing.F) {
	for _, text := range []string{"", "7", "-1", "1e9", "99999999999999999999"} {
		f.Add(text, "holder")
	}
	f.Fuzz(func(t *testing.T, text, holder string) {
		l := &coordinationv1.Lease{Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder}}
		l.Annotations = map[string]string{epochAnnotation: text}
		if s, err := seenIn(l); err == nil && (s.epoch < 0 || s.epoch > maxEpoch || s.holder != holder) {
			t.Errorf("%q is %+v", text, s)
		}
	})
}
