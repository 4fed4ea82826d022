package registry

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

func testPacer(t *testing.T, limit int) *pacer {
	t.Helper()
	m, err := newMetrics(nil, newBudget(1<<20, 1<<10))
	if err != nil {
		t.Fatal(err)
	}
	p := newPacer(m, limit, 1<<10, 1<<20)
	p.tune.limit, p.tune.base = limit, limit
	return p
}

func TestPacerServesInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := testPacer(t, 1)
		held, err := p.acquire(t.Context(), false, true)
		if err != nil {
			t.Fatal(err)
		}
		var order []string
		done := make(chan struct{})
		ask := func(ctx context.Context, name string, begun bool) {
			go func() {
				if l, err := p.acquire(ctx, begun, true); err == nil {
					order = append(order, name) // one lease: one at a time
					l.park()
				}
				done <- struct{}{}
			}()
			synctest.Wait()
		}
		gone, cancel := context.WithCancel(t.Context())
		ask(t.Context(), "first", false)
		ask(gone, "gone", false)
		ask(t.Context(), "second", false)
		ask(t.Context(), "retry", true)
		cancel()
		<-done
		held.park()
		held.park() // does nothing
		for range 3 {
			<-done
		}
		if len(order) != 3 || order[0] != "retry" || order[1] != "first" || order[2] != "second" {
			t.Errorf("served in the order %v", order)
		}
		if p.busy != 0 || len(p.queue) != 0 {
			t.Errorf("%d leases and %d waiting are left", p.busy, len(p.queue))
		}
	})
}

func TestPacerParks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := testPacer(t, 1)
		stalled, err := p.acquire(t.Context(), false, true)
		if err != nil {
			t.Fatal(err)
		}
		stalled.park()
		other, err := p.acquire(t.Context(), false, true) // would hang
		if err != nil {
			t.Fatal(err)
		}
		stalled.resume()
		stalled.resume()
		if p.spare() != nil {
			t.Error("a spare lease beside one too many")
		}
		other.park()
		spare := p.spare()
		if spare == nil {
			t.Fatal("no spare lease at the limit")
		}
		spare.park()
		stalled.park()
		if p.busy != 0 {
			t.Errorf("%d leases are left", p.busy)
		}
	})
}

func TestPacerLeavesABusyHostAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := testPacer(t, 8)
		busy := &StatusError{Code: http.StatusTooManyRequests, RetryAfter: 7 * time.Second}
		var held []*lease
		for range 8 {
			l, err := p.acquire(t.Context(), false, true)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, l)
		}
		impatient := make(chan error)
		go func() {
			_, err := p.acquire(t.Context(), false, false)
			impatient <- err
		}()
		synctest.Wait()
		for range 5 { // those that are under way meet with the same
			p.throttled(busy)
		}
		if err := <-impatient; !errors.Is(err, error(busy)) {
			t.Errorf("who has another host to ask was told %v", err)
		}
		if p.tune.limit != 4 {
			t.Errorf("limit %d after one time of being too busy", p.tune.limit)
		}
		for _, l := range held {
			l.park()
		}
		if p.spare() != nil {
			t.Error("a spare request to a host that is too busy")
		}
		short, cancel := context.WithTimeout(t.Context(), 6*time.Second)
		defer cancel()
		start := time.Now()
		if _, err := p.acquire(short, false, true); !errors.Is(err, error(busy)) || time.Since(start) > 0 {
			t.Errorf("who has no time to wait was told %v after %v", err, time.Since(start))
		}
		l, err := p.acquire(t.Context(), false, true)
		if err != nil || time.Since(start) != 7*time.Second {
			t.Errorf("asked again after %v (%v)", time.Since(start), err)
		}
		l.park()
	})
}

// Without Retry-After the pause doubles, up to a bound, until a range comes.
func TestPacerPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := testPacer(t, 8)
		pause := func() time.Duration {
			start := time.Now()
			p.throttled(&StatusError{Code: http.StatusServiceUnavailable})
			l, err := p.acquire(t.Context(), false, true)
			if err != nil {
				t.Fatal(err)
			}
			l.park()
			return time.Since(start)
		}
		first := pause()
		for range 10 {
			if d := pause(); d > backoffMax {
				t.Errorf("pause of %v", d)
			}
		}
		if last := pause(); first > backoffBase || last < time.Second {
			t.Errorf("pauses from %v to %v", first, last)
		}
		p.sample(1<<20, time.Millisecond, time.Second)
		if d := pause(); d > backoffBase {
			t.Errorf("pause of %v although the host has recovered", d)
		}
	})
}

func TestHostIsLeftOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &host{pacer: testPacer(t, 8)}
		if h.skip() {
			t.Fatal("a host of which nothing is known is left out")
		}
		for range 3 {
			h.failed() // one failure, seen by three
		}
		for _, avoid := range []time.Duration{minAvoid, 2 * minAvoid, 4 * minAvoid} {
			if time.Sleep(avoid - 1); !h.skip() {
				t.Fatalf("asked again within %v", avoid)
			}
			time.Sleep(1)
			if h.skip() {
				t.Fatalf("not asked after %v", avoid)
			}
			if !h.skip() {
				t.Fatal("a second caller was let through before the first knew")
			}
			h.failed()
		}
		h.alive()
		if h.skip() {
			t.Error("left out although it answers")
		}
		h.failed()
		if time.Sleep(minAvoid); h.skip() {
			t.Error("left out for longer, although it answered between")
		}
	})
}
