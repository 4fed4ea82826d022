package pool_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

// add has a Manager work on another fake node.
func (r *running) add(n *fakeNode, info pool.NodeInfo) {
	r.t.Helper()
	if err := r.AddNode(n.name, n, info); err != nil {
		r.t.Fatal(err)
	}
	settle()
}

// TestNodesComeAndGo: the pool follows the nodes while it runs, and what is to be reserved moves with them.
func TestNodesComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFakeNode(t, "a"), newFakeNode(t, "b")
		r := start(t, pool.Config{Store: newMemory(), PoolSize: 2})
		defer r.stop()
		g := r.gateway("g")
		defer g.leave()
		r.add(a, pool.NodeInfo{})
		if err := r.AddNode("a", b, pool.NodeInfo{}); err == nil {
			t.Error("two nodes of one name were taken")
		}
		r.apply("f", func(s *hearthv1.FunctionSpec) { s.Scaling.Min = 1 })
		time.Sleep(5 * time.Second)
		if n := len(g.serving("f")); n != 1 {
			t.Fatalf("%d instances serve, want 1", n)
		}
		r.add(b, pool.NodeInfo{})
		time.Sleep(5 * time.Second)
		if n := b.in("*", warm); n != 2 {
			t.Errorf("the new node has %d warm instances, want 2", n)
		}
		was := g.serving("f")[0]
		r.RemoveNode("a")
		settle()
		time.Sleep(200 * time.Millisecond)
		settle()
		if now := g.serving("f"); len(now) != 1 || now[0] == was || b.in("f", serves) != 1 {
			t.Errorf("%v serve after their node is gone, was %s", now, was)
		}
		r.RemoveNode("a")
		r.checkIndex()
	})
}

// TestRemovedNodeEndsWhatIsUnderWay: claims and preparations on a node that goes are done elsewhere or end.
func TestRemovedNodeEndsWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFakeNode(t, "a"), newFakeNode(t, "b")
		r := start(t, pool.Config{Store: newMemory(), PoolSize: 2})
		defer r.stop()
		r.add(a, pool.NodeInfo{})
		r.apply("f", nil)
		time.Sleep(5 * time.Second)
		a.on(func() { a.dead = true }) // no call is answered any more
		var work sync.WaitGroup
		for n := range 4 { // more than are prepared at once
			work.Go(func() {
				f := &hearthv1.Function{Name: fmt.Sprint("f", n), Spec: &hearthv1.FunctionSpec{Image: "image"}}
				_, err := r.Apply(t.Context(), connect.NewRequest(&hearthv1.ApplyRequest{Function: f, Prepare: true}))
				if err == nil {
					t.Errorf("%s was prepared on a node that answers nothing", f.Name)
				}
			})
		}
		work.Go(func() {
			res, err := r.allocate("f", "", 30*time.Second)
			if err != nil || res.GetInstance().GetNode() != "b" {
				t.Errorf("node %q answered, want b: %v", res.GetInstance().GetNode(), err)
			}
		})
		settle()
		r.add(b, pool.NodeInfo{})
		time.Sleep(5 * time.Second)
		r.RemoveNode("a")
		work.Wait()
		r.checkIndex()
	})
}

// TestCordonedNode: what is warm there is given up and nothing new comes; what serves goes on.
func TestCordonedNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFakeNode(t, "a"), newFakeNode(t, "b")
		r := start(t, pool.Config{Nodes: map[string]pool.Node{"a": a}, Store: newMemory(), PoolSize: 2})
		defer r.stop()
		r.apply("f", nil)
		time.Sleep(5 * time.Second)
		r.must("f")
		r.add(b, pool.NodeInfo{})
		r.UpdateNode("a", pool.NodeInfo{Cordoned: true})
		time.Sleep(5 * time.Second)
		if a.in("*", warm) != 0 || a.in("f", serves) != 1 {
			t.Errorf("a cordoned node has %d warm and %d serving instances, want 0 and 1", a.in("*", warm), a.in("f", serves))
		}
		if node := r.must("f").GetInstance().GetNode(); node != "b" {
			t.Errorf("a claim went to node %s", node)
		}
		r.UpdateNode("a", pool.NodeInfo{})
		time.Sleep(5 * time.Second)
		if n := a.in("*", warm); n != 2 {
			t.Errorf("%d warm instances after the cordon, want 2", n)
		}
	})
}

// TestWarmSets: each node keeps what the sets that cover it ask for.
func TestWarmSets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFakeNode(t, "a"), newFakeNode(t, "b")
		r := start(t, pool.Config{Store: newMemory(), PoolSize: -1})
		defer r.stop()
		r.add(a, pool.NodeInfo{Labels: map[string]string{"disk": "fast"}})
		r.add(b, pool.NodeInfo{})
		r.applyRuntime("python", 0)
		fast := func(_ string, n pool.NodeInfo) bool { return n.Labels["disk"] == "fast" }
		r.SetWarmSets([]pool.WarmSet{{Runtime: "python", PerNode: 2, Covers: fast}, {PerNode: 1}, {Runtime: "python", PerNode: 1}, {Runtime: "unknown", PerNode: 4}})
		time.Sleep(10 * time.Second)
		if a.booted("python") != 3 || b.booted("python") != 1 || a.booted("") != 1 || b.booted("") != 1 {
			t.Errorf("python %d and %d, want 3 and 1; sandboxes %d and %d, want 1 and 1", a.booted("python"), b.booted("python"), a.booted(""), b.booted(""))
		}
		r.SetWarmSets(nil)
		time.Sleep(10 * time.Second)
		if a.total()+b.total() != 0 {
			t.Errorf("%d instances are left of sets that are gone", a.total()+b.total())
		}
	})
}

// TestWarmSetImages: the nodes that a set covers have its images ahead, also one that comes later, and one that could not be had.
func TestWarmSetImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := newFakeNode(t, "a"), newFakeNode(t, "b"), newFakeNode(t, "c")
		refused := 0
		a.broken = func(_ string, _ *hearthv1.Runtime, image string) error {
			if image == "registry/late:1" && refused < 2 {
				refused++
				return connect.NewError(connect.CodeUnavailable, errors.New("registry is away"))
			}
			return nil
		}
		r := start(t, pool.Config{Store: newMemory(), PoolSize: -1, PrepareNodes: 8})
		defer r.stop()
		fast := func(_ string, n pool.NodeInfo) bool { return n.Labels["disk"] == "fast" }
		r.add(a, pool.NodeInfo{Labels: map[string]string{"disk": "fast"}})
		r.add(b, pool.NodeInfo{})
		r.SetWarmSets([]pool.WarmSet{{Covers: fast, Images: []string{"registry/early:1", "registry/late:1"}}})
		time.Sleep(10 * time.Second)
		if got := a.has(); !slices.Equal(got, []string{"registry/early:1"}) {
			t.Errorf("the node has %q, want the image that can be had", got)
		}
		r.add(c, pool.NodeInfo{Labels: map[string]string{"disk": "fast"}})
		time.Sleep(2 * time.Minute)
		for _, n := range []*fakeNode{a, c} {
			if got := n.has(); !slices.Equal(got, []string{"registry/early:1", "registry/late:1"}) {
				t.Errorf("node %s has %q, want both images", n.name, got)
			}
		}
		if got := b.has(); len(got) != 0 {
			t.Errorf("a node that the set does not cover has %q", got)
		}
	})
}

// TestDeadNode: within moments of a node's death its Instances get no traffic and its claims go elsewhere; when it is back, they are too.
func TestDeadNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := newFakeNode(t, "a"), newFakeNode(t, "b"), newFakeNode(t, "c")
		r := start(t, pool.Config{Nodes: map[string]pool.Node{"a": a}, Store: newMemory(), PoolSize: 2})
		defer r.stop()
		g := r.gateway("g")
		g.mayReturn = true
		defer g.leave()
		r.apply("f", func(s *hearthv1.FunctionSpec) { s.Scaling.Max = 1 })
		time.Sleep(5 * time.Second)
		first := r.must("f").GetInstance()
		r.add(b, pool.NodeInfo{})
		r.add(c, pool.NodeInfo{})
		time.Sleep(5 * time.Second)
		died := time.Now()
		a.die()
		time.Sleep(2 * time.Second)
		settle()
		if now := g.serving("f"); len(now) != 0 {
			t.Fatalf("%v are named to gateways after their node died", now)
		}
		if second := r.must("f").GetInstance(); second.GetNode() == "a" || time.Since(died) > 3*time.Second {
			t.Errorf("the next claim went to %s after %s", second.GetNode(), time.Since(died))
		}
		a.on(func() { a.dead = false })
		time.Sleep(5 * time.Second)
		if now := g.serving("f"); len(now) != 2 || now[0] != first.GetId() && now[1] != first.GetId() {
			t.Errorf("%v serve now that the node is back; %s should be among them", now, first.GetId())
		}
		r.checkIndex()
	})
}

// TestManagerCutOff: when it hears of no node any more, what is wrong is not the nodes.
func TestManagerCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFakeNode(t, "a"), newFakeNode(t, "b")
		r := start(t, pool.Config{Nodes: map[string]pool.Node{"a": a, "b": b}, Store: newMemory(), PoolSize: 2})
		defer r.stop()
		g := r.gateway("g")
		defer g.leave()
		r.apply("f", nil)
		time.Sleep(5 * time.Second)
		r.must("f")
		settle()
		a.die()
		b.die()
		time.Sleep(20 * time.Second)
		if n := len(g.serving("f")); n != 1 {
			t.Errorf("%d instances are named to gateways, want 1", n)
		}
	})
}

// TestClaimOnDyingNode: a claim that is under way when its node dies is made again elsewhere.
func TestClaimOnDyingNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFakeNode(t, "a"), newFakeNode(t, "b")
		a.activateTime = 500 * time.Millisecond
		r := start(t, pool.Config{Nodes: map[string]pool.Node{"a": a}, Store: newMemory(), PoolSize: 2})
		defer r.stop()
		r.apply("f", nil)
		time.Sleep(5 * time.Second)
		begun := time.Now()
		got := make(chan string, 1)
		a.on(func() { a.dead = true }) // silently: the stream still stands
		go func() {
			res, err := r.allocate("f", "", 30*time.Second)
			if err != nil {
				t.Error(err)
			}
			got <- res.GetInstance().GetNode()
		}()
		settle()
		r.add(b, pool.NodeInfo{})
		time.Sleep(2 * time.Second)
		a.die()
		if node := <-got; node != "b" || time.Since(begun) > 5*time.Second {
			t.Errorf("node %s answered after %s", node, time.Since(begun))
		}
	})
}

// TestNewTermLooksFirst: what nodes have already is not made again because one of them is slower to tell.
func TestNewTermLooksFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFakeNode(t, "a"), newFakeNode(t, "b")
		c := pool.Config{Nodes: map[string]pool.Node{"a": a, "b": b}, Store: newMemory(), PoolSize: 2}
		r := start(t, c)
		r.apply("f", func(s *hearthv1.FunctionSpec) { s.Scaling.Min = 2 })
		time.Sleep(5 * time.Second)
		if a.in("f", serves) != 1 || b.in("f", serves) != 1 {
			t.Errorf("%d and %d instances serve, want one on each node", a.in("f", serves), b.in("f", serves))
		}
		r.stop()
		b.on(func() { b.watchTime = time.Second })
		r = start(t, c)
		defer r.stop()
		g := r.gateway("g")
		defer g.leave()
		time.Sleep(5 * time.Second)
		if n := len(g.serving("f")); n != 2 || a.in("f", serves)+b.in("f", serves) != 2 {
			t.Errorf("%d instances serve, want 2", n)
		}
	})
}

// TestPrepareNodes: a Function is prepared on some nodes, the same ones in the next term, and on others when those go.
func TestPrepareNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := pool.Config{Nodes: map[string]pool.Node{}, Store: newMemory(), PoolSize: -1, PrepareNodes: 2}
		var nodes []*fakeNode
		for n := range 5 {
			nodes = append(nodes, newFakeNode(t, fmt.Sprint("n", n)))
			c.Nodes[nodes[n].name] = nodes[n]
		}
		where := func() (names []string) {
			for _, n := range nodes {
				if n.preparations("f-00001") > 0 {
					names = append(names, n.name)
				}
			}
			return names
		}
		r := start(t, c)
		r.apply("f", nil)
		time.Sleep(time.Second)
		first := where()
		if len(first) != 2 {
			t.Fatalf("prepared on %v, want two nodes", first)
		}
		r.stop()
		r = start(t, c)
		defer r.stop()
		time.Sleep(time.Second)
		if fmt.Sprint(where()) != fmt.Sprint(first) {
			t.Errorf("prepared on %v in the next term, was %v", where(), first)
		}
		r.RemoveNode(first[0])
		time.Sleep(time.Second)
		if len(where()) != 3 {
			t.Errorf("prepared on %v after one of %v went", where(), first)
		}
	})
}
