package pool_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func TestReleaseWithoutGatewaysIsImmediate(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		id := m.must("hello").GetInstance().GetId()
		begun := time.Now()
		if got := m.release(&hearthv1.ReleaseRequest{InstanceId: id, Wait: true}); got != 1 {
			t.Errorf("released %d", got)
		}
		if time.Since(begun) > 100*time.Millisecond || n.in("hello", serves) != 0 {
			t.Errorf("took %s, %d serve", time.Since(begun), n.in("hello", serves))
		}
		if got := m.release(&hearthv1.ReleaseRequest{InstanceId: id, Wait: true}); got != 0 {
			t.Errorf("released %d of what is gone", got)
		}
	})
}

func TestDrainWaitsForEveryGateway(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		a, b := m.gateway("a"), m.gateway("b")
		defer a.leave()
		defer b.leave()
		id := m.must("hello").GetInstance().GetId()
		settle()
		m.Acknowledge("a", a.at(), map[string]int32{id: 1})
		m.Acknowledge("b", b.at(), nil)
		m.release(&hearthv1.ReleaseRequest{InstanceId: id})
		settle()
		if len(a.serving("hello")) != 0 {
			t.Error("gateways still see it serving")
		}
		steps := []struct {
			say  func()
			gone bool
		}{
			{func() {}, false},
			{func() { m.Acknowledge("b", b.at(), nil) }, false},
			{func() { m.Acknowledge("a", a.at(), map[string]int32{id: 1}) }, false},
			{func() { m.Acknowledge("stranger", 1<<62, nil) }, false},
			{func() { m.Acknowledge("a", a.at(), nil) }, true},
		}
		for c, step := range steps {
			step.say()
			time.Sleep(time.Second)
			if gone := n.in("hello", serves) == 0; gone != step.gone {
				t.Errorf("step %d: gone is %t", c, gone)
			}
		}
	})
}

func TestDrainIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Timeout = seconds(5) })
		g := m.gateway("a")
		defer g.leave()
		id := m.must("hello").GetInstance().GetId()
		begun := time.Now()
		m.release(&hearthv1.ReleaseRequest{InstanceId: id, Wait: true})
		if took := time.Since(begun); took < 35*time.Second || took > 36*time.Second {
			t.Errorf("took %s, want 35 s", took)
		}
	})
}

func TestGatewayThatLeavesIsDropped(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		g := m.gateway("a")
		id := m.must("hello").GetInstance().GetId()
		m.Acknowledge("a", g.at(), map[string]int32{id: 3})
		g.leave()
		begun := time.Now()
		m.release(&hearthv1.ReleaseRequest{InstanceId: id, Wait: true})
		if took := time.Since(begun); took < 5*time.Second || took > 6*time.Second {
			t.Errorf("took %s, want 5 s", took)
		}
	})
}

func TestReleaseForgetsTheImageAfterTheInstances(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		m.must("hello")
		m.must("hello")
		if got := m.release(&hearthv1.ReleaseRequest{Function: "hello", Wait: true, ForgetImage: true}); got != 2 {
			t.Errorf("released %d", got)
		}
		if remove, ok := n.forgot("hello-00001"); !ok || !remove || n.in("hello", serves) != 0 {
			t.Errorf("forgotten %t, with its image %t, %d serve", ok, remove, n.in("hello", serves))
		}
		_, err := m.Release(t.Context(), connect.NewRequest(&hearthv1.ReleaseRequest{Function: "nobody"}))
		wantCode(t, err, connect.CodeNotFound)
		_, err = m.Release(t.Context(), connect.NewRequest(&hearthv1.ReleaseRequest{}))
		wantCode(t, err, connect.CodeInvalidArgument)
	})
}

func TestReleaseWhileItStarts(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		n.on(func() { n.activateTime = 10 * time.Second })
		m.apply("hello", nil)
		go func() { _, _ = m.allocate("hello", "x", 15*time.Second) }()
		time.Sleep(time.Second)
		if got := m.release(&hearthv1.ReleaseRequest{Function: "hello"}); got != 1 {
			t.Errorf("released %d", got)
		}
		time.Sleep(time.Minute)
		if n.in("*", claimed) != 0 || n.in("*", warm) < 3 {
			t.Errorf("%d claimed, %d warm", n.in("*", claimed), n.in("*", warm))
		}
	})
}

func TestDiscardIsRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		id := m.must("hello").GetInstance().GetId()
		failures := 3
		n.on(func() {
			n.before = func(call, _ string) error {
				if call == "discard" && failures > 0 {
					failures--
					return code(connect.CodeUnavailable, "not now")
				}
				return nil
			}
		})
		m.release(&hearthv1.ReleaseRequest{InstanceId: id, Wait: true})
		if n.in("hello", serves) != 0 {
			t.Error("it still serves")
		}
	})
}

func TestWatchBeginsWithEverything(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("a", nil)
		m.apply("b", nil)
		m.apply("c", nil)
		m.must("b")
		if _, err := m.Delete(t.Context(), connect.NewRequest(&hearthv1.DeleteRequest{Name: "c"})); err != nil {
			t.Fatal(err)
		}
		g := m.gateway("g")
		if !g.synced || len(g.latest) != 3 || !g.latest["c"].GetDeleted() || len(g.serving("b")) != 1 {
			t.Errorf("synced %t, latest %v", g.synced, g.latest)
		}
		m.must("a")
		settle()
		if len(g.serving("a")) != 1 {
			t.Error("a change did not come")
		}
		if _, err := m.Delete(t.Context(), connect.NewRequest(&hearthv1.DeleteRequest{Name: "a"})); err == nil {
			settle()
			if !g.latest["a"].GetDeleted() {
				t.Error("no tombstone")
			}
		} else {
			t.Error(err)
		}
		g.leave()
	})
}

func TestSlowSubscriberIsSentAway(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		gate, ended := make(chan struct{}), make(chan error, 1)
		first := true
		go func() {
			ended <- m.Subscribe(context.WithoutCancel(t.Context()), "slow", func(*hearthv1.WatchResponse) error {
				if first {
					first = false
					<-gate
				}
				return nil
			})
		}()
		settle()
		for c := range 1100 {
			m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Queue = int32(c + 1) })
		}
		close(gate)
		wantCode(t, <-ended, connect.CodeResourceExhausted)
	})
}

func TestVersionsGrowOverRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		var last int64
		for range 3 {
			m := start(t, c)
			time.Sleep(time.Second)
			m.apply("hello", nil)
			m.must("hello")
			g := m.gateway("g")
			if g.at() <= last {
				t.Errorf("version %d after %d", g.at(), last)
			}
			last = g.at()
			m.stop()
			<-g.finished
		}
	})
}

func TestSteadyTrafficNeedsNoManager(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		m := start(t, c)
		time.Sleep(time.Second)
		m.apply("hello", nil)
		id := m.must("hello").GetInstance().GetId()
		g := m.gateway("g")
		m.stop()
		<-g.finished
		time.Sleep(time.Hour)
		if got := g.serving("hello"); len(got) != 1 || n.in("hello", serves) != 1 {
			t.Fatalf("endpoints %v without a manager", got)
		}
		m = start(t, c)
		defer m.stop()
		g = m.gateway("g")
		defer g.leave()
		time.Sleep(time.Minute)
		if got := g.serving("hello"); len(got) != 1 || got[0] != id {
			t.Errorf("endpoints %v after it came back, want %s", got, id)
		}
	})
}

func TestNodeThatIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		c.NodeTimeout = 20 * time.Second
		m := start(t, c)
		defer m.stop()
		time.Sleep(time.Second)
		m.apply("hello", nil)
		m.must("hello")
		g := m.gateway("g")
		defer g.leave()
		g.mayReturn = true
		begun := time.Now()
		go n.kill(60 * time.Second)
		for _, step := range []struct {
			at    time.Duration
			serve int
		}{{19 * time.Second, 1}, {22 * time.Second, 0}, {62 * time.Second, 1}} {
			time.Sleep(step.at - time.Since(begun))
			if got := len(g.serving("hello")); got != step.serve {
				t.Errorf("after %s: %d endpoints, want %d", step.at, got, step.serve)
			}
		}
	})
}

func TestInstanceThatVanishes(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		a, b := m.must("hello").GetInstance().GetId(), m.must("hello").GetInstance().GetId()
		g := m.gateway("g")
		defer g.leave()
		// Its process ends.
		n.mu.Lock()
		n.set(n.instances[a], hearthv1.State_STATE_GONE)
		n.mu.Unlock()
		settle()
		if got := g.serving("hello"); len(got) != 1 || got[0] != b {
			t.Errorf("%v serve, want %s", got, b)
		}
		// It is not there any more when its node is back.
		n.mu.Lock()
		delete(n.instances, b)
		n.cut()
		n.mu.Unlock()
		time.Sleep(time.Second)
		if got := g.serving("hello"); len(got) != 0 {
			t.Errorf("%v serve, want none", got)
		}
		_, err := m.Release(t.Context(), connect.NewRequest(&hearthv1.ReleaseRequest{InstanceId: b, Wait: true}))
		if err != nil {
			t.Error(err)
		}
	})
}

func TestEventsDoNotGoBack(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		g := m.gateway("g")
		defer g.leave()
		id := m.must("hello").GetInstance().GetId()
		settle()
		for _, s := range []hearthv1.State{warm, claimed} {
			n.mu.Lock()
			n.emit(&hearthv1.Instance{Id: id, Node: "node", State: s})
			n.mu.Unlock()
			settle()
			if got := g.serving("hello"); len(got) != 1 {
				t.Errorf("an old %s made the endpoints %v", s, got)
			}
		}
	})
}
