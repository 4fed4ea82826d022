package pool_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

const (
	warm    = hearthv1.State_STATE_WARM
	serves  = hearthv1.State_STATE_SERVING
	claimed = hearthv1.State_STATE_CLAIMED
	frozen  = hearthv1.State_STATE_FROZEN
)

func one(n *fakeNode) pool.Config {
	return pool.Config{Nodes: map[string]pool.Node{n.name: n}, Store: newMemory()}
}

// bubble runs a test in a synctest bubble with one node and one Manager.
func bubble(t *testing.T, test func(t *testing.T, n *fakeNode, m *running)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		m := start(t, one(n))
		defer m.stop()
		time.Sleep(2 * time.Second)
		test(t, n, m)
		n.check()
	})
}

func TestPoolIsFilledAndRefilled(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		if n.in("*", warm) != 3 || n.made() != 3 {
			t.Fatalf("%d warm of %d created, want 3 of 3", n.in("*", warm), n.made())
		}
		m.apply("hello", nil)
		m.must("hello")
		time.Sleep(2 * time.Second)
		if n.in("*", warm) != 3 || n.made() != 4 {
			t.Errorf("%d warm of %d created, want 3 of 4", n.in("*", warm), n.made())
		}
	})
}

func TestAllocateFromPoolTakesOnlyTheNodesTime(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		begun := time.Now()
		res := m.must("hello")
		if took := time.Since(begun); took != n.activateTime {
			t.Errorf("took %s, want %s", took, n.activateTime)
		}
		if i := res.GetInstance(); i.GetState() != serves || i.GetAddress() == "" || i.GetClaim().GetEpoch() != m.Epoch() {
			t.Errorf("instance is %v", i)
		}
		if p := res.GetPhases(); len(p) != 2 || p[0].GetName() != "sandbox" || p[1].GetName() != "create" {
			t.Errorf("phases are %v", p)
		}
	})
}

func TestAllocateBeyondThePoolMakesInstances(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		var group sync.WaitGroup
		names := make([]string, 10)
		for c := range 10 {
			group.Go(func() {
				res := m.must("hello")
				names[c] = res.GetInstance().GetId()
				first := res.GetPhases()[0]
				if first.GetName() != "sandbox" {
					t.Errorf("first phase is %s", first.GetName())
				}
			})
		}
		begun := time.Now()
		group.Wait()
		if took := time.Since(begun); took > 400*time.Millisecond {
			t.Errorf("ten took %s", took)
		}
		seen := map[string]bool{}
		for _, name := range names {
			if seen[name] {
				t.Errorf("%s was handed out twice", name)
			}
			seen[name] = true
		}
		time.Sleep(3 * time.Second)
		if n.made() != 13 || n.in("*", warm) != 3 {
			t.Errorf("%d created and %d warm, want 13 and 3", n.made(), n.in("*", warm))
		}
	})
}

func TestAllocateIsIdempotent(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		var group sync.WaitGroup
		ids := make([]string, 3)
		for c := range 2 {
			group.Go(func() {
				res, err := m.allocate("hello", "same", time.Minute)
				if err != nil {
					t.Error(err)
				}
				ids[c] = res.GetInstance().GetId()
			})
		}
		group.Wait()
		res, err := m.allocate("hello", "same", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		ids[2] = res.GetInstance().GetId()
		if ids[0] != ids[1] || ids[1] != ids[2] || n.in("hello", serves) != 1 {
			t.Errorf("instances %v", ids)
		}
		m.apply("other", nil)
		_, err = m.allocate("other", "same", time.Minute)
		wantCode(t, err, connect.CodeInvalidArgument)
	})
}

func TestAllocateErrors(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Max = 1 })
		_, err := m.allocate("nobody", "", time.Second)
		wantCode(t, err, connect.CodeNotFound)
		_, err = m.allocate("hello", "", -time.Second)
		wantCode(t, err, connect.CodeDeadlineExceeded)
		_, err = m.allocate("hello", "a b", time.Second)
		wantCode(t, err, connect.CodeInvalidArgument)
		m.must("hello")
		_, err = m.allocate("hello", "", time.Second)
		wantCode(t, err, connect.CodeResourceExhausted)
	})
}

func TestMaxCountsThoseThatStart(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Max = 2 })
		var mu sync.Mutex
		var group sync.WaitGroup
		refused := 0
		for range 6 {
			group.Go(func() {
				if _, err := m.allocate("hello", "", time.Second); err != nil {
					mu.Lock()
					defer mu.Unlock()
					refused++
				}
			})
		}
		group.Wait()
		if refused != 4 || n.in("hello", serves) != 2 {
			t.Errorf("%d refused, %d serve", refused, n.in("hello", serves))
		}
	})
}

func TestEmptyPoolThatCannotGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		n.on(func() {
			n.before = func(call, _ string) error {
				if call == "create" {
					return code(connect.CodeInternal, "no space left")
				}
				return nil
			}
		})
		m := start(t, one(n))
		defer m.stop()
		m.apply("hello", nil)
		begun := time.Now()
		_, err := m.allocate("hello", "", 5*time.Second)
		wantCode(t, err, connect.CodeResourceExhausted)
		if took := time.Since(begun); took != 5*time.Second || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("after %s: %v", took, err)
		}
	})
}

func TestNoNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		n.down = true
		m := start(t, one(n))
		defer m.stop()
		m.apply("hello", nil)
		_, err := m.allocate("hello", "", time.Second)
		wantCode(t, err, connect.CodeUnavailable)
		// One that waits is served as soon as the node is there: nobody polls.
		time.AfterFunc(3*time.Second, func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.down = false
		})
		m.must("hello")
	})
}

func TestFunctionThatDoesNotStartRests(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		starts := 0
		n.on(func() {
			n.start = func(*hearthv1.Revision) error {
				starts++
				return code(connect.CodeInternal, "exit status 1: no module named app")
			}
		})
		m.apply("hello", nil)
		for range 3 {
			_, err := m.allocate("hello", "", time.Minute)
			wantCode(t, err, connect.CodeInternal)
			if !strings.Contains(err.Error(), "no module named app") {
				t.Errorf("error does not say why: %v", err)
			}
		}
		_, err := m.allocate("hello", "", time.Minute)
		wantCode(t, err, connect.CodeUnavailable)
		var e *connect.Error
		if !asConnect(err, &e) || e.Meta().Get("Retry-After") != "1" {
			t.Errorf("no hint when to ask again: %v", err)
		}
		if starts != 3 {
			t.Errorf("%d starts, want 3", starts)
		}
		time.Sleep(1100 * time.Millisecond)
		n.on(func() { n.start = nil })
		m.must("hello")
		m.must("hello")
	})
}

func asConnect(err error, e **connect.Error) bool {
	c, ok := err.(*connect.Error)
	*e = c
	return ok
}

func TestRetryOnAnotherInstance(t *testing.T) {
	for _, c := range []connect.Code{connect.CodeFailedPrecondition, connect.CodeNotFound, connect.CodeUnavailable} {
		t.Run(c.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, n *fakeNode, m *running) {
				m.apply("hello", nil)
				failures := 2
				n.on(func() {
					n.before = func(call, id string) error {
						if call == "activate" && failures > 0 {
							failures--
							return code(c, "not this one")
						}
						return nil
					}
				})
				m.must("hello")
				n.mu.Lock()
				n.before = nil
				n.mu.Unlock()
				time.Sleep(2 * time.Minute)
				if w := n.in("*", warm); w < 3 || w > 6 || n.in("hello", serves) != 1 {
					t.Errorf("%d warm, %d serve", w, n.in("hello", serves))
				}
			})
		})
	}
}

// TestNodeSaysWhatIsFreeBeforeTheClaimFails: its restart is faster than the error of the call that it broke.
func TestNodeSaysWhatIsFreeBeforeTheClaimFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		c.PoolSize = 1
		m := start(t, c)
		defer m.stop()
		time.Sleep(time.Second)
		m.apply("hello", nil)
		failures := 1
		n.on(func() {
			n.before = func(call, _ string) error {
				if call != "activate" || failures == 0 {
					return nil
				}
				failures--
				n.sleep(time.Second)
				return errLost
			}
		})
		time.AfterFunc(500*time.Millisecond, func() { n.on(n.cut) })
		m.must("hello")
		time.Sleep(2 * time.Minute)
		serving := n.in("hello", serves)
		n.on(func() {
			if serving != 1 || len(n.discards) != 0 {
				t.Errorf("%d serve, discarded %v", serving, n.discards)
			}
		})
	})
}

func TestLostAnswerIsFoundByTheStream(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		n.on(func() {
			n.after = func(call, _ string) error {
				if call == "activate" {
					return errLost
				}
				return nil
			}
		})
		m.must("hello")
		if n.in("hello", serves) != 1 {
			t.Errorf("%d serve, want 1", n.in("hello", serves))
		}
	})
}

func TestBurstDoesNotStarveOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		c.ClaimsPerNode = 16
		m := start(t, c)
		defer m.stop()
		time.Sleep(2 * time.Second)
		n.on(func() { n.activateTime = time.Second })
		m.apply("burst", nil)
		m.apply("quiet", nil)
		var group sync.WaitGroup
		for c := range 40 {
			group.Go(func() {
				if _, err := m.allocate("burst", fmt.Sprintf("b%d", c), time.Minute); err != nil {
					t.Error(err)
				}
			})
		}
		settle()
		time.Sleep(10 * time.Millisecond)
		begun := time.Now()
		m.must("quiet")
		if took := time.Since(begun); took > n.activateTime+2*n.createTime {
			t.Errorf("the other function waited %s", took)
		}
		group.Wait()
		n.on(func() {
			if n.mostOf["burst"] > 12 {
				t.Errorf("%d claims of one function at once", n.mostOf["burst"])
			}
		})
	})
}

func TestCallerWhoGoesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		n.on(func() { n.createTime = 5 * time.Second })
		m := start(t, one(n))
		defer m.stop()
		m.apply("hello", nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := m.Allocate(ctx, connect.NewRequest(&hearthv1.AllocateRequest{Function: "hello"}))
		wantCode(t, err, connect.CodeDeadlineExceeded)
		time.Sleep(time.Minute)
		if n.in("hello", serves) != 0 || n.in("*", warm) != 3 {
			t.Errorf("%d serve and %d are warm", n.in("hello", serves), n.in("*", warm))
		}
		// One that has its Instance goes on, for the next who asks.
		n.on(func() { n.activateTime = 5 * time.Second })
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = m.Allocate(ctx, connect.NewRequest(&hearthv1.AllocateRequest{Function: "hello"}))
		wantCode(t, err, connect.CodeDeadlineExceeded)
		time.Sleep(time.Minute)
		if m.status("hello").GetReady() != 1 {
			t.Error("the instance is lost")
		}
	})
}

// A term that has claimed nothing yet fences the one before.
func TestTermFencesFromItsBeginning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		old := start(t, c)
		old.apply("hello", nil)
		time.Sleep(3 * time.Second)
		n.on(func() { n.epoch = old.Epoch() + 1 }) // as the next one's Watch does, of which nothing tells this one
		if res, err := old.allocate("hello", "", 3*time.Second); err == nil {
			t.Errorf("the stale manager got %v", res)
		}
		old.stop()
		n.on(func() { n.epoch = 0 })
		next := start(t, c)
		defer next.stop()
		time.Sleep(3 * time.Second)
		n.on(func() {
			if n.epoch != next.Epoch() {
				t.Errorf("the node has heard of term %d, and this is term %d", n.epoch, next.Epoch())
			}
		})
		n.check()
	})
}

func TestStaleManagerIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		old := start(t, c)
		old.apply("hello", nil)
		next := start(t, c)
		defer next.stop()
		time.Sleep(3 * time.Second)
		if old.Epoch() >= next.Epoch() {
			t.Fatalf("epochs %d and %d", old.Epoch(), next.Epoch())
		}
		next.must("hello")
		_, err := old.allocate("hello", "", 3*time.Second)
		wantCode(t, err, connect.CodeUnavailable)
		if err := <-old.ended; err == nil || !strings.Contains(err.Error(), "later term") {
			t.Errorf("the stale manager ended with %v", err)
		}
		time.Sleep(time.Minute)
		if n.in("hello", serves) != 1 || n.in("*", warm) != 3 {
			t.Errorf("%d serve, %d are warm", n.in("hello", serves), n.in("*", warm))
		}
		n.check()
	})
}
