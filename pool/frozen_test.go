package pool_test

import (
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

// idle deploys a Function, has n Instances serve long enough to be given up, and scales it to none.
func idle(t *testing.T, n *fakeNode, m *running, name string, count int, change func(*hearthv1.FunctionSpec)) {
	t.Helper()
	m.apply(name, change)
	for range count {
		m.must(name)
	}
	time.Sleep(5 * time.Second)
	m.Scale(name, 0, "nothing to do")
	time.Sleep(time.Second)
	if got := n.in(name, serves); got != 0 {
		t.Fatalf("%d still serve", got)
	}
}

func TestScaleDownFreezes(t *testing.T) {
	for _, c := range []struct {
		name         string
		frozen, want int
	}{{"one by default", 0, 1}, {"two", 2, 2}, {"none", -1, 0}, {"more than there are", 9, 3}} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *fakeNode, m *running) {
				idle(t, n, m, "hello", 3, func(s *hearthv1.FunctionSpec) { s.Scaling.Frozen = int32(c.frozen) })
				if got := n.in("hello", frozen); got != c.want {
					t.Errorf("%d frozen, want %d", got, c.want)
				}
				if s := m.status("hello"); s.GetReady() != 0 || s.GetStarting() != 0 {
					t.Errorf("frozen ones count: %v", s)
				}
				m.checkIndex()
			})
		})
	}
}

func TestFrozenIsThawedFirst(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		g := m.gateway("g")
		defer g.leave()
		go func() { // a gateway that acknowledges at once
			for {
				select {
				case <-g.finished:
					return
				case <-time.After(10 * time.Millisecond):
					m.Acknowledge("g", g.at(), nil)
				}
			}
		}()
		m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Max = 1 })
		first := m.must("hello").GetInstance()
		time.Sleep(5 * time.Second)
		m.Scale("hello", 0, "nothing to do")
		time.Sleep(time.Second)
		if len(g.serving("hello")) != 0 || n.in("hello", frozen) != 1 {
			t.Fatalf("%v serve, %d frozen", g.serving("hello"), n.in("hello", frozen))
		}
		made := n.made()
		again := m.must("hello").GetInstance() // a maximum of one does not count it
		if again.GetId() != first.GetId() || again.GetClaim().GetId() == first.GetClaim().GetId() || n.made() != made {
			t.Errorf("got %s by claim %s, want %s by another claim", again.GetId(), again.GetClaim().GetId(), first.GetId())
		}
		settle()
		if got := g.serving("hello"); len(got) != 1 || got[0] != first.GetId() {
			t.Errorf("gateways know %v", got)
		}
	})
}

func TestFrozenIsGivenUp(t *testing.T) {
	for name, give := range map[string]func(*testing.T, *fakeNode, *running){
		"new revision": func(_ *testing.T, _ *fakeNode, m *running) {
			m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Env = map[string]string{"A": "1"} })
		},
		"fewer wanted": func(_ *testing.T, _ *fakeNode, m *running) {
			m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Frozen = -1 })
		},
		"deleted": func(t *testing.T, _ *fakeNode, m *running) {
			if _, err := m.Delete(t.Context(), connect.NewRequest(&hearthv1.DeleteRequest{Name: "hello"})); err != nil {
				t.Error(err)
			}
		},
		"released": func(_ *testing.T, _ *fakeNode, m *running) {
			m.release(&hearthv1.ReleaseRequest{Function: "hello", Wait: true})
		},
		"nobody asked for long": func(_ *testing.T, n *fakeNode, _ *running) {
			time.Sleep(50 * time.Minute)
			if n.in("hello", frozen) != 1 {
				t.Error("given up too early")
			}
			time.Sleep(10 * time.Minute)
		},
		"evicted by the node": func(_ *testing.T, n *fakeNode, _ *running) {
			n.on(func() {
				for _, i := range n.instances {
					if i.State == frozen {
						n.set(i, hearthv1.State_STATE_GONE)
					}
				}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *fakeNode, m *running) {
				idle(t, n, m, "hello", 1, nil)
				if n.in("hello", frozen) != 1 {
					t.Fatal("nothing is frozen")
				}
				give(t, n, m)
				time.Sleep(time.Second)
				if got := n.in("hello", frozen); got != 0 {
					t.Errorf("%d are still frozen", got)
				}
				m.checkIndex()
			})
		})
	}
}

// TestReleaseDiscardsWhatWouldFreeze: a human's or a gateway's word counts more than the scaler's, also while its drain goes on.
func TestReleaseDiscardsWhatWouldFreeze(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		g := m.gateway("g")
		defer g.leave()
		m.apply("hello", nil)
		id := m.must("hello").GetInstance().GetId()
		time.Sleep(5 * time.Second)
		m.Scale("hello", 0, "nothing to do")
		m.release(&hearthv1.ReleaseRequest{InstanceId: id})
		settle()
		m.Acknowledge("g", g.at(), nil)
		time.Sleep(time.Second)
		if n.in("hello", frozen) != 0 || n.in("hello", serves) != 0 {
			t.Errorf("%d frozen, %d serve", n.in("hello", frozen), n.in("hello", serves))
		}
	})
}

// TestFreezeWaitsForEveryGateway: a request that is there would hang in what is frozen.
func TestFreezeWaitsForEveryGateway(t *testing.T) {
	for name, ends := range map[string]bool{"requests end": true, "requests do not end": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *fakeNode, m *running) {
				a, b := m.gateway("a"), m.gateway("b")
				defer a.leave()
				defer b.leave()
				m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Timeout = seconds(5) })
				id := m.must("hello").GetInstance().GetId()
				time.Sleep(5 * time.Second)
				m.Scale("hello", 0, "nothing to do")
				settle()
				busy := map[string]int32{id: 1}
				for _, say := range []func(){
					func() { m.Acknowledge("b", b.at(), nil) },
					func() { m.Acknowledge("a", a.at()-1, nil) },
					func() { m.Acknowledge("a", a.at(), busy) },
				} {
					say()
					time.Sleep(time.Second)
					if n.in("hello", frozen) != 0 || n.in("hello", serves) != 1 {
						t.Fatal("it did not wait")
					}
				}
				if ends {
					m.Acknowledge("a", a.at(), nil)
				}
				time.Sleep(time.Minute)
				if got := n.in("hello", frozen) == 1; got != ends || n.in("hello", serves) != 0 {
					t.Errorf("frozen %t, %d serve", got, n.in("hello", serves))
				}
			})
		})
	}
}

// TestAnswerOfBeforeIsNotRepeated: an id is answered with its Instance as long as that is its own.
func TestAnswerOfBeforeIsNotRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		first, err := m.allocate("hello", "same", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		m.Scale("hello", 0, "nothing to do")
		time.Sleep(time.Second)
		again, err := m.allocate("hello", "same", time.Minute)
		if err != nil || n.in("hello", serves) != 1 || again.GetInstance().GetClaim().GetId() == first.GetInstance().GetClaim().GetId() {
			t.Errorf("%d serve, answered %v, %v", n.in("hello", serves), again, err)
		}
	})
}

func TestFreezeThatFailsDiscards(t *testing.T) {
	for _, when := range []string{"before", "after"} {
		t.Run(when, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *fakeNode, m *running) {
				lose := func(call, _ string) error {
					if call == "freeze" {
						return errLost
					}
					return nil
				}
				n.on(func() {
					if when == "before" {
						n.before = lose
					} else {
						n.after = lose
					}
				})
				idle(t, n, m, "hello", 1, nil)
				// If only the answer was lost, the stream has told of it; either is right, but not something between.
				if n.total() != n.in("*", warm)+n.in("hello", frozen) {
					t.Errorf("%v", n.instances)
				}
				m.must("hello")
				m.checkIndex()
			})
		})
	}
}

func TestNodeThatCannotFreeze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		n.old = true
		m := start(t, one(n))
		defer m.stop()
		time.Sleep(2 * time.Second)
		idle(t, n, m, "hello", 2, nil)
		if n.in("hello", frozen) != 0 || n.total() != n.in("*", warm) {
			t.Errorf("%v", n.instances)
		}
		m.must("hello")
	})
}

// TestThawThatFails: the Function is not to blame, and the caller gets another Instance.
func TestThawThatFails(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		idle(t, n, m, "hello", 1, nil)
		failures := 1
		n.on(func() {
			n.start = func(*hearthv1.Revision) error {
				if failures--; failures >= 0 {
					return code(connect.CodeInternal, "it does not thaw")
				}
				return nil
			}
		})
		m.must("hello")
		if n.in("hello", serves) != 1 || n.in("hello", frozen) != 0 {
			t.Errorf("%d serve, %d frozen", n.in("hello", serves), n.in("hello", frozen))
		}
	})
}

func TestLostAnswersOfAThaw(t *testing.T) {
	for _, when := range []string{"before", "after"} {
		t.Run(when, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *fakeNode, m *running) {
				idle(t, n, m, "hello", 1, nil)
				failures := 1
				lose := func(call, _ string) error {
					if call == "activate" && failures > 0 {
						failures--
						return errLost
					}
					return nil
				}
				n.on(func() {
					if when == "before" {
						n.before = lose
					} else {
						n.after = lose
					}
				})
				m.must("hello")
				time.Sleep(2 * time.Minute)
				if got := n.in("hello", serves); got != 1 || n.total() != got+n.in("*", warm)+n.in("hello", frozen) {
					t.Errorf("%d serve of %v", got, n.instances)
				}
				m.checkIndex()
			})
		})
	}
}

func TestFrozenSurvivesRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		m := start(t, c)
		time.Sleep(2 * time.Second)
		idle(t, n, m, "hello", 1, nil)
		m.stop()
		m = start(t, c)
		defer m.stop()
		n.kill(time.Second)
		time.Sleep(time.Second)
		if n.in("hello", frozen) != 1 {
			t.Fatal("it was given up")
		}
		made := n.made()
		m.must("hello")
		if n.made() != made || n.in("hello", frozen) != 0 {
			t.Errorf("%d made, want %d; %d frozen", n.made(), made, n.in("hello", frozen))
		}
	})
}

func TestFrozenOfAnUnknownFunctionIsDiscarded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		m := start(t, c)
		time.Sleep(2 * time.Second)
		idle(t, n, m, "hello", 1, nil)
		m.stop()
		c.Store.(*memory).records["hello"] = storeTombstone("hello")
		m = start(t, c)
		defer m.stop()
		time.Sleep(time.Second)
		if got := n.in("hello", frozen); got != 0 {
			t.Errorf("%d are frozen", got)
		}
	})
}

func TestVersionsOrderWhatNodesSay(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		g := m.gateway("g")
		defer g.leave()
		said := m.must("hello").GetInstance()
		settle()
		g.mayReturn = true // by the same claim, which no node does
		say := func(s hearthv1.State, version int64) {
			n.on(func() {
				n.emit(&hearthv1.Instance{Id: said.GetId(), Node: "node", State: s, Version: version, Function: "hello",
					Revision: said.GetRevision(), Address: said.GetAddress(), Claim: said.GetClaim()})
			})
			settle()
		}
		now := said.GetVersion()
		for _, step := range []struct {
			state hearthv1.State
			at    int64
			serve int
		}{
			{frozen, now - 1, 1}, {frozen, now + 1, 0}, {serves, now, 0}, {claimed, now + 2, 0}, {serves, now + 3, 1},
		} {
			say(step.state, step.at)
			if got := len(g.serving("hello")); got != step.serve {
				t.Errorf("%s at %d after %d: %d serve, want %d", step.state, step.at, now, got, step.serve)
			}
		}
		// A node that takes it for generic again is not believed.
		say(warm, now+10)
		time.Sleep(time.Second)
		if n.in("hello", serves) != 0 {
			t.Error("what has held a Revision was kept as generic")
		}
	})
}

// TestFiftyAtOnce claims a whole pool: all claims are on the node together, and none waits for another.
func TestFiftyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		c.PoolSize = 50
		m := start(t, c)
		defer m.stop()
		time.Sleep(time.Minute)
		if n.in("*", warm) != 50 {
			t.Fatalf("%d warm", n.in("*", warm))
		}
		m.apply("hello", nil)
		results := make(chan time.Duration, 50)
		for range 50 {
			go func() {
				begun := time.Now()
				if _, err := m.allocate("hello", "", time.Minute); err != nil {
					t.Error(err)
				}
				results <- time.Since(begun)
			}()
		}
		for range 50 {
			if took := <-results; took != n.activateTime {
				t.Errorf("a claim took %s, the node needs %s", took, n.activateTime)
			}
		}
		n.on(func() {
			if n.mostOf["hello"] != 50 || n.created != 50 {
				t.Errorf("%d claims were on the node at once, %d instances made; want 50 of both", n.mostOf["hello"], n.created)
			}
		})
	})
}

var _ pool.Node = (*fakeNode)(nil)
