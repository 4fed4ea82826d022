package pool_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
	"github.com/hearth-serverless/hearth/pool/store"
)

func storeTombstone(name string) store.Record { return store.Record{Name: name, Serial: 1} }

// TestNothingIsClaimedTwiceOrStranded lets callers, faults, kills of nodes and restarts of the manager run against one another,
// and then looks whether everything comes to rest: every claim has an outcome, pools are full and not more, no one got another's
// Instance.
func TestNothingIsClaimedTwiceOrStranded(t *testing.T) {
	seeds := 40
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { chaos(t, uint64(seed)) })
		})
	}
}

// dice is a source of chance for many goroutines.
type dice struct {
	mu sync.Mutex
	r  *rand.Rand
}

func (d *dice) n(n int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.r.IntN(n)
}

func chaos(t *testing.T, seed uint64) {
	d := &dice{r: rand.New(rand.NewPCG(seed, 1))}
	nodes := map[string]*fakeNode{}
	c := pool.Config{Nodes: map[string]pool.Node{}, Store: newMemory()}
	for i := range 1 + d.n(3) {
		name := fmt.Sprintf("node%d", i)
		nodes[name] = newFakeNode(t, name)
		nodes[name].createTime = time.Duration(10+d.n(1000)) * time.Millisecond
		nodes[name].activateTime = time.Duration(10+d.n(3000)) * time.Millisecond
		c.Nodes[name] = nodes[name]
	}
	m := start(t, c)
	m.applyRuntime("python", 2)
	for f := range 3 {
		m.apply(fmt.Sprintf("f%d", f), func(s *hearthv1.FunctionSpec) {
			s.Scaling.Max = 6
			s.Timeout = seconds(1)
			if f == 2 {
				runIn(s, "python")
			}
		})
	}
	for _, n := range nodes {
		fault := func(call, _ string) error {
			switch roll := d.n(100); {
			case roll < 5:
				return errLost
			case roll < 7 && call != "watch":
				return code(connect.CodeAborted, "interrupted")
			}
			return nil
		}
		n.mu.Lock()
		n.before, n.after = fault, fault
		n.mu.Unlock()
	}
	storm(t, d, m, nodes)
	m.stop()
	m = start(t, c)
	defer m.stop()
	storm(t, d, m, nodes)
	settleDown(t, m, nodes)
}

// storm lasts until all its callers have their answers.
func storm(t *testing.T, d *dice, m *running, nodes map[string]*fakeNode) {
	var group sync.WaitGroup
	for range 30 {
		group.Go(func() {
			time.Sleep(time.Duration(d.n(20_000)) * time.Millisecond)
			name := fmt.Sprintf("f%d", d.n(3))
			begun, within := time.Now(), time.Duration(1+d.n(20))*time.Second
			res, err := m.allocate(name, "", within)
			if took := time.Since(begun); took > within+4*time.Second {
				t.Errorf("an answer after %s, the deadline was %s: %v", took, within, err)
			}
			if err == nil && res.GetInstance().GetFunction() != name {
				t.Errorf("%s got an instance of %s", name, res.GetInstance().GetFunction())
			}
			if err == nil && d.n(2) == 0 {
				time.Sleep(time.Duration(d.n(5)) * time.Second)
				m.release(&hearthv1.ReleaseRequest{InstanceId: res.GetInstance().GetId()})
			}
		})
	}
	for _, n := range nodes {
		group.Go(func() {
			for range d.n(4) {
				time.Sleep(time.Duration(d.n(8000)) * time.Millisecond)
				if d.n(2) == 0 {
					n.kill(time.Duration(d.n(3000)) * time.Millisecond)
					continue
				}
				n.mu.Lock()
				n.cut()
				n.mu.Unlock()
			}
		})
	}
	group.Go(func() {
		time.Sleep(time.Duration(d.n(20_000)) * time.Millisecond)
		m.applyRuntime("python", 2, fmt.Sprintf("library%d", d.n(1000)))
	})
	group.Go(func() {
		for range 10 {
			time.Sleep(2 * time.Second)
			m.checkIndex()
			m.Scale(fmt.Sprintf("f%d", d.n(3)), d.n(8), "chance")
		}
	})
	group.Wait()
	settle()
}

func settleDown(t *testing.T, m *running, nodes map[string]*fakeNode) {
	for _, n := range nodes {
		n.mu.Lock()
		n.before, n.after = nil, nil
		n.mu.Unlock()
	}
	time.Sleep(5 * time.Minute)
	for name, n := range nodes {
		n.check()
		if w, py := n.in("*", warm), n.booted("python"); w-py < 3 || w-py > 6 || py < 2 || py > 4 {
			t.Errorf("%s: %d warm and %d of them python, want 3 and 2 (at most twice that)", name, w, py)
		}
		n.on(func() {
			if n.most > 2*(3+3+8+2) {
				t.Errorf("%s: %d instances were idle at once", name, n.most)
			}
		})
		if rest := n.total() - n.in("*", warm) - n.in("*", serves) - n.in("*", frozen); rest != 0 {
			t.Errorf("%s: %d instances are neither warm, serving nor frozen: %v", name, rest, n.instances)
		}
	}
	m.checkIndex()
	for f := range 3 {
		name := fmt.Sprintf("f%d", f)
		serve, kept := 0, 0
		for _, n := range nodes {
			serve += n.in(name, serves)
			kept += n.in(name, frozen)
		}
		if kept > 1 {
			t.Errorf("%s: %d are kept frozen", name, kept)
		}
		s := m.status(name)
		if int(s.GetReady()) != serve || s.GetStarting() != 0 {
			t.Errorf("%s: the manager says %v, the nodes %d", name, s, serve)
		}
		m.release(&hearthv1.ReleaseRequest{Function: name, Wait: true})
	}
	time.Sleep(time.Minute)
	for name, n := range nodes {
		if n.in("*", serves)+n.in("*", frozen) != 0 || n.total() != n.in("*", warm) {
			t.Errorf("%s: %v are left", name, n.instances)
		}
	}
}
