package pool_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/anishathalye/porcupine"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

// verb is what is done with an Instance; to those who use the pool each Instance is one object with these operations.
type verb int

const (
	give verb = iota // to a claim: legal when it is nobody's, and generic or of the same Function; again for the same claim
	rest             // freeze it: it is nobody's then, and of its Function for ever
	end              // discard it: nothing is legal any more
)

type operation struct {
	instance, claim, function string
	verb                      verb
}

// outcome is what the one who asked was told.
type outcome int

const (
	done outcome = iota
	unknown
)

type ownership struct {
	claim, function string
	ended           bool
}

func model() porcupine.Model {
	return porcupine.Model{
		Partition: func(all []porcupine.Operation) (parts [][]porcupine.Operation) {
			at := map[string]int{}
			for _, op := range all {
				id := op.Input.(operation).instance
				if _, ok := at[id]; !ok {
					at[id] = len(parts)
					parts = append(parts, nil)
				}
				parts[at[id]] = append(parts[at[id]], op)
			}
			return parts
		},
		Init: func() any { return ownership{} },
		Step: func(state, input, output any) (bool, any) {
			before, in := state.(ownership), input.(operation)
			after, legal := before.step(in)
			if output.(outcome) == unknown && !legal {
				return true, before // it never took effect
			}
			return legal, after
		},
		DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v → %d", input, output) },
	}
}

func (o ownership) step(in operation) (ownership, bool) {
	switch in.verb {
	case give:
		legal := o.claim == in.claim || o.claim == "" && (o.function == "" || o.function == in.function)
		return ownership{claim: in.claim, function: in.function}, legal && !o.ended
	case rest:
		return ownership{function: o.function}, o.claim != "" && !o.ended
	default:
		return ownership{ended: true}, true
	}
}

// history records operations with the order in which they began and ended.
type history struct {
	mu    sync.Mutex
	clock int64
	ops   []porcupine.Operation
}

func (h *history) tick() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	return h.clock
}

func (h *history) record(begun int64, in operation, out outcome) {
	at := h.tick()
	if out == unknown {
		at = math.MaxInt64 // it may take effect at any time
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{Input: in, Output: out, Call: begun, Return: at})
}

// certain says whether an error means that a node did nothing.
func certain(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeFailedPrecondition, connect.CodeNotFound, connect.CodeUnimplemented:
		return true
	}
	return false
}

// recorder is a node of which all that changes owners is recorded.
type recorder struct {
	*fakeNode
	h *history
}

func (r recorder) record(begun int64, in operation, err error) {
	switch {
	case err == nil:
		r.h.record(begun, in, done)
	case !certain(err):
		r.h.record(begun, in, unknown)
	}
}

func (r recorder) Activate(ctx context.Context, req *hearthv1.ActivateRequest) (*hearthv1.ActivateResponse, error) {
	begun := r.h.tick()
	res, err := r.fakeNode.Activate(ctx, req)
	r.record(begun, operation{req.GetInstanceId(), req.GetClaim().GetId(), req.GetRevision().GetFunction(), give}, err)
	return res, err
}

func (r recorder) Freeze(ctx context.Context, req *hearthv1.FreezeRequest) (*hearthv1.Instance, error) {
	begun := r.h.tick()
	res, err := r.fakeNode.Freeze(ctx, req)
	r.record(begun, operation{instance: req.GetInstanceId(), verb: rest}, err)
	return res, err
}

func (r recorder) Discard(ctx context.Context, req *hearthv1.DiscardRequest) error {
	begun := r.h.tick()
	err := r.fakeNode.Discard(ctx, req)
	r.record(begun, operation{instance: req.GetInstanceId(), verb: end}, err)
	return err
}

// TestHistoriesAreLinearizable lets callers claim and give up, and the scaler freeze and thaw, while answers are lost, nodes are killed
// and a second manager takes over from the first, which does not know it yet. Then it looks for an order in which all that callers
// and managers were told can be true: no Instance is given to two claims at once, nor ever to another Function.
func TestHistoriesAreLinearizable(t *testing.T) {
	seeds := 30
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			h := &history{}
			synctest.Test(t, func(t *testing.T) { record(t, h, uint64(seed)) })
			gives := map[verb]int{}
			for _, op := range h.ops {
				gives[op.Input.(operation).verb]++
			}
			if gives[give] == 0 || gives[end] == 0 {
				t.Errorf("nothing happened: %v", gives)
			}
			if !porcupine.CheckOperations(model(), h.ops) {
				t.Errorf("the history of %d operations has no order; what cannot be ordered:\n%s", len(h.ops), impossible(h.ops))
			}
		})
	}
}

// impossible shows the operations of the Instances that have no order.
func impossible(all []porcupine.Operation) (out string) {
	m := model()
	for _, part := range m.Partition(all) {
		if porcupine.CheckOperations(m, part) {
			continue
		}
		for _, op := range part {
			out += fmt.Sprintf("%d to %d: %s\n", op.Call, op.Return, m.DescribeOperation(op.Input, op.Output))
		}
	}
	return out
}

func record(t *testing.T, h *history, seed uint64) {
	d := &dice{r: rand.New(rand.NewPCG(seed, 2))}
	nodes := map[string]*fakeNode{}
	c := pool.Config{Nodes: map[string]pool.Node{}, Store: newMemory()}
	for i := range 2 {
		n := newFakeNode(t, fmt.Sprintf("node%d", i))
		n.createTime = time.Duration(10+d.n(300)) * time.Millisecond
		n.activateTime = time.Duration(1+d.n(500)) * time.Millisecond
		n.freezeTime = time.Duration(1+d.n(100)) * time.Millisecond
		nodes[n.name] = n
		c.Nodes[n.name] = recorder{n, h}
	}
	first := start(t, c)
	defer first.stop()
	first.applyRuntime("python", 2)
	for f := range 3 {
		first.apply(fmt.Sprintf("f%d", f), func(s *hearthv1.FunctionSpec) {
			s.Scaling.Max, s.Scaling.Frozen = 4, 2
			if f == 2 {
				runIn(s, "python")
			}
		})
	}
	fault := func(string, string) error {
		if d.n(100) < 5 {
			return errLost
		}
		return nil
	}
	for _, n := range nodes {
		n.on(func() { n.before, n.after = fault, fault })
	}
	var group sync.WaitGroup
	use := func(m *running) {
		for range 25 {
			group.Go(func() { claim(d, h, m) })
		}
		group.Go(func() {
			for range 30 {
				time.Sleep(time.Duration(d.n(1500)) * time.Millisecond)
				m.Scale(fmt.Sprintf("f%d", d.n(3)), d.n(4), "chance")
			}
		})
	}
	for _, n := range nodes {
		group.Go(func() {
			for range 1 + d.n(3) {
				time.Sleep(time.Duration(d.n(15_000)) * time.Millisecond)
				n.kill(time.Duration(d.n(2000)) * time.Millisecond)
			}
		})
	}
	use(first)
	time.Sleep(time.Duration(d.n(20_000)) * time.Millisecond)
	second := start(t, c)
	defer second.stop()
	use(second)
	group.Wait()
	for _, n := range nodes {
		n.check()
	}
}

// claim is one caller: it asks, and perhaps gives up what it got. Asking again by the same id is left out: that is answered from
// memory, which a manager that is not one any more may have of before.
func claim(d *dice, h *history, m *running) {
	time.Sleep(time.Duration(d.n(30_000)) * time.Millisecond)
	name, begun := fmt.Sprintf("f%d", d.n(3)), h.tick()
	res, err := m.allocate(name, "", time.Duration(1+d.n(10))*time.Second)
	if err != nil {
		return
	}
	i := res.GetInstance()
	h.record(begun, operation{i.GetId(), i.GetClaim().GetId(), name, give}, done)
	time.Sleep(time.Duration(d.n(8000)) * time.Millisecond)
	if d.n(4) == 0 {
		_, _ = m.Release(m.t.Context(), connect.NewRequest(&hearthv1.ReleaseRequest{InstanceId: i.GetId()}))
	}
}

// TestModelSeesWhatMustNotBe: a check that cannot fail is worth nothing.
func TestModelSeesWhatMustNotBe(t *testing.T) {
	ours := func(claim, function string) operation { return operation{"i", claim, function, give} }
	frozen, gone := operation{instance: "i", verb: rest}, operation{instance: "i", verb: end}
	for _, c := range []struct {
		name string
		ops  []operation
		want bool
	}{
		{"given, frozen, given again", []operation{ours("a", "f"), frozen, ours("b", "f")}, true},
		{"told twice", []operation{ours("a", "f"), ours("a", "f")}, true},
		{"given to two", []operation{ours("a", "f"), ours("b", "f")}, false},
		{"given to another function", []operation{ours("a", "f"), frozen, ours("b", "g")}, false},
		{"given when it was gone", []operation{ours("a", "f"), gone, ours("b", "f")}, false},
		{"told of what is another's by now", []operation{ours("a", "f"), frozen, ours("b", "f"), ours("a", "f")}, false},
	} {
		h := &history{}
		for _, op := range c.ops {
			h.record(h.tick(), op, done)
		}
		if got := porcupine.CheckOperations(model(), h.ops); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}
