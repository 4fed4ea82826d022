package pool_test

import (
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

// merged has a Function share pods.
func merged(tenant, group string) func(*hearthv1.FunctionSpec) {
	return func(s *hearthv1.FunctionSpec) {
		s.Tenant, s.Group, s.Resources = tenant, group, &hearthv1.Resources{MemoryBytes: 64 << 20}
	}
}

// podsIn counts the Instances of each pod that serve.
func (n *fakeNode) podsIn() map[string]int {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := map[string]int{}
	for _, i := range n.instances {
		if i.State == serves {
			all[i.Pod]++
		}
	}
	return all
}

func TestGroupSharesAPod(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		for _, name := range []string{"a", "b", "c"} {
			m.apply(name, merged("acme", "low"))
		}
		time.Sleep(3 * time.Second)
		made := n.made()
		first := m.must("a").GetInstance()
		begun := time.Now()
		second := m.must("b").GetInstance()
		if took := time.Since(begun); took != n.createTime+n.activateTime {
			t.Errorf("the second took %s", took)
		}
		third := m.must("c").GetInstance()
		for _, i := range []*hearthv1.Instance{second, third} {
			if i.GetPod() != first.GetId() || i.GetId() == first.GetId() || i.GetTenant() != "acme" || i.GetGroup() != "low" {
				t.Errorf("got %v beside %v", i, first)
			}
		}
		time.Sleep(3 * time.Second)
		if got := n.made() - made; got != 3 { // two workers, and a sandbox in the place of the one that was taken
			t.Errorf("%d were made", got)
		}
		// Another Instance of the same Function shares nothing with the first.
		if i := m.must("a").GetInstance(); i.GetPod() != i.GetId() {
			t.Errorf("a second of a is %v", i)
		}
		// What is frozen keeps its place.
		m.Scale("b", 0, "idle")
		time.Sleep(5 * time.Second)
		if again := m.must("b").GetInstance(); again.GetId() != second.GetId() {
			t.Errorf("thawed %v, was %v", again, second)
		}
		m.checkIndex()
	})
}

// TestBurstOfAGroup: those that come at once wait for the pod that the first of them gets.
func TestBurstOfAGroup(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		const functions = 12
		for f := range functions {
			m.apply(fmt.Sprint("f", f), merged("acme", "low"))
		}
		time.Sleep(3 * time.Second)
		ended := make(chan error)
		for f := range functions {
			go func() {
				_, err := m.allocate(fmt.Sprint("f", f), "", 10*time.Second)
				ended <- err
			}()
		}
		for range functions {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		pods := n.podsIn()
		for pod, workers := range pods {
			if workers > pool.DefaultPodWorkers {
				t.Errorf("pod %s has %d workers", pod, workers)
			}
		}
		if len(pods) != 2 {
			t.Errorf("%d Functions are in %v", functions, pods)
		}
		time.Sleep(10 * time.Second)
		if n.in("*", hearthv1.State_STATE_WARM) != 3 {
			t.Errorf("%d wait after the burst", n.in("*", hearthv1.State_STATE_WARM))
		}
		m.checkIndex()
	})
}

// TestTenantsNeverShare: not with equal names of groups, not when pools are empty, not after a restart of either side.
func TestTenantsNeverShare(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		tenants := map[string]string{}
		for f := range 12 {
			name, tenant := fmt.Sprint("f", f), []string{"acme", "evil", ""}[f%3]
			tenants[name] = tenant
			m.apply(name, merged(tenant, "low"))
		}
		check := func() {
			t.Helper()
			owner := map[string]string{}
			n.on(func() {
				for _, i := range n.instances {
					if i.Function == "" {
						continue
					}
					tenant := tenants[i.Function]
					if was, known := owner[i.Pod]; known && was != tenant {
						t.Errorf("pod %s is of %q and of %q", i.Pod, was, tenant)
					}
					owner[i.Pod] = tenant
				}
			})
			if len(owner) != 3 {
				t.Errorf("there are pods %v", owner)
			}
		}
		ended := make(chan struct{})
		for name := range tenants {
			go func() { m.must(name); ended <- struct{}{} }()
		}
		for range tenants {
			<-ended
		}
		check()
		for name := range tenants {
			m.release(&hearthv1.ReleaseRequest{Function: name, Wait: name == "f3"})
		}
		n.kill(time.Second)
		time.Sleep(3 * time.Second)
		for name := range tenants {
			m.must(name)
		}
		check()
		m.checkIndex()
	})
}

// TestPodThatTakesNone: a worker that cannot be made costs its Function nothing but a little time.
func TestPodThatTakesNone(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("a", merged("acme", "low"))
		m.apply("b", merged("acme", "low"))
		time.Sleep(3 * time.Second)
		pod := m.must("a").GetInstance().GetId()
		n.on(func() { n.owners[pod] = "somebody" })
		if i := m.must("b").GetInstance(); i.GetPod() != i.GetId() {
			t.Errorf("b got %v", i)
		}
		m.checkIndex()
	})
}

// TestWorkersOfARuntime are booted in the pod.
func TestWorkersOfARuntime(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.applyRuntime("python", 1)
		for _, name := range []string{"a", "b"} {
			m.apply(name, func(s *hearthv1.FunctionSpec) { python(s); merged("acme", "low")(s) })
		}
		m.apply("c", merged("acme", "low"))
		time.Sleep(3 * time.Second)
		a, b, c := m.must("a").GetInstance(), m.must("b").GetInstance(), m.must("c").GetInstance()
		if a.GetRuntime() != "python" || b.GetRuntime() != "python" || b.GetPod() != a.GetId() || c.GetPod() != a.GetId() || c.GetRuntime() != "" {
			t.Errorf("got %v, %v and %v", a, b, c)
		}
		m.checkIndex()
	})
}

// TestPodIsGivenUp: a worker that was made for somebody who went away does not keep the pod.
func TestPodIsGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("a", merged("acme", "low"))
		m.apply("b", merged("acme", "low"))
		time.Sleep(3 * time.Second)
		m.must("a")
		_, err := m.allocate("b", "", n.createTime/2)
		wantCode(t, err, connect.CodeResourceExhausted)
		m.release(&hearthv1.ReleaseRequest{Function: "a", Wait: true})
		time.Sleep(5 * time.Second)
		if n.total() != 3 {
			t.Errorf("%d Instances are left", n.total())
		}
		m.checkIndex()
	})
}

func TestValidateGroup(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*hearthv1.FunctionSpec)
		right  bool
	}{
		"group":           {merged("", "low"), true},
		"tenant alone":    {func(s *hearthv1.FunctionSpec) { s.Tenant = "acme" }, true},
		"no label":        {merged("Acme", "low"), false},
		"a path":          {merged("acme", "../low"), false},
		"port of its own": {func(s *hearthv1.FunctionSpec) { merged("acme", "low")(s); s.Port = 80 }, false},
	} {
		spec := &hearthv1.FunctionSpec{Image: "registry.example/x:1"}
		c.change(spec)
		if err := pool.Validate("x", spec); (err == nil) != c.right {
			t.Errorf("%s: %v", name, err)
		}
	}
}
