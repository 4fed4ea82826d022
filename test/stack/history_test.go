package stack_test

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// event is what somebody learnt of an Instance: that it is nobody's yet, that it is assigned, or that it was given back.
type event struct {
	instance string
	kind     eventKind
	// function and claim that it is assigned to.
	function, claim string
	// keeps: the Function freezes its Instances, and may claim one again that it had before.
	keeps bool
}

type eventKind string

const (
	eventWarm     eventKind = "warm"
	eventAssigned eventKind = "assigned"
	eventReleased eventKind = "released"
)

// assignment is the state of one Instance: to whom it belongs, for ever, by which claim, and whether it was given back.
type assignment struct {
	function, claim string
	released        bool
}

// assignments is the specification of one Instance: it is warm until it is assigned once; what is assigned is never warm again nor
// anybody else's; what was given back is assigned to nobody.
func assignments() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return assignment{} },
		Step: func(state, input, _ any) (bool, any) {
			s, e := state.(assignment), input.(event)
			switch e.kind {
			case eventWarm:
				return s == assignment{}, s
			case eventReleased:
				s.released = true
				return true, s
			}
			again := s.function == e.function && (s.claim == e.claim || e.keeps)
			if s.released || s.function != "" && !again {
				return false, s
			}
			return true, assignment{function: e.function, claim: e.claim}
		},
	}
}

// history is what clients and watchers learnt, each with the time in which it was true at some moment.
type history struct {
	began time.Time

	mu   sync.Mutex // guards what follows
	ops  []porcupine.Operation
	last map[string]event // of each Instance, as a watcher saw it
	// freezes are the Functions of which Instances are kept frozen.
	freezes map[string]bool
}

func newHistory(freezes ...string) *history {
	h := &history{began: time.Now(), last: map[string]event{}, freezes: map[string]bool{}}
	for _, f := range freezes {
		h.freezes[f] = true
	}
	return h
}

// now is a moment on the history's clock.
func (h *history) now() int64 { return int64(time.Since(h.began)) }

// note files what was learnt by a call that began at a moment and has just returned.
func (h *history) note(called int64, e event) {
	returned := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	e.keeps = h.freezes[e.function]
	h.ops = append(h.ops, porcupine.Operation{Input: e, Call: called, Return: returned})
}

// watch looks at all Instances many times a second, until it is stopped. What is as it was is not noted again.
func (h *history) watch(d *deployment) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() {
		for ctx.Err() == nil {
			called := h.now()
			if list, err := d.instances(ctx, ""); err == nil {
				h.see(called, list)
			}
			nap(ctx, 10*time.Millisecond)
		}
	})
	return sync.OnceFunc(func() {
		cancel()
		work.Wait()
	})
}

func (h *history) see(called int64, list []*hearthv1.Instance) {
	for _, i := range list {
		e := event{instance: i.GetId(), kind: eventWarm}
		switch state := i.GetState(); {
		case state == hearthv1.State_STATE_WARM:
		case state >= hearthv1.State_STATE_CLAIMED && state <= hearthv1.State_STATE_FROZEN && i.GetClaim().GetId() != "":
			e.kind, e.function, e.claim = eventAssigned, i.GetFunction(), i.GetClaim().GetId()
		default:
			continue
		}
		if h.last[e.instance] != e { // only the watcher reads and writes it
			h.last[e.instance] = e
			h.note(called, e)
		}
	}
}

// faults says which Instances were given to two, and which claims had two Instances.
func (h *history) faults() (out []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	byInstance, byClaim := map[string][]porcupine.Operation{}, map[string]string{}
	for _, op := range h.ops {
		e := op.Input.(event)
		byInstance[e.instance] = append(byInstance[e.instance], op)
		if e.kind != eventAssigned {
			continue
		}
		if other, ok := byClaim[e.claim]; ok && other != e.instance {
			out = append(out, fmt.Sprintf("claim %s had two instances, %s and %s", e.claim, e.instance, other))
		}
		byClaim[e.claim] = e.instance
	}
	for id, ops := range byInstance {
		if porcupine.CheckOperations(assignments(), ops) {
			continue
		}
		slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
		fault := fmt.Sprintf("instance %s was not given to one alone:", id)
		for _, op := range ops {
			fault += fmt.Sprintf("\n  from %v to %v: %+v", time.Duration(op.Call), time.Duration(op.Return), op.Input)
		}
		out = append(out, fault)
	}
	return out
}

// check says what was claimed twice, of least claims or more.
func (h *history) check(t *testing.T, least int) {
	t.Helper()
	for _, fault := range h.faults() {
		t.Error(fault)
	}
	claims := map[string]bool{}
	for _, op := range h.ops {
		if e := op.Input.(event); e.kind == eventAssigned {
			claims[e.claim] = true
		}
	}
	t.Logf("history: %d claims in %d events", len(claims), len(h.ops))
	if len(claims) < least {
		t.Errorf("only %d claims were seen, want %d", len(claims), least)
	}
}

// TestHistoryIsJudged has histories that are right and wrong: a check that finds nothing could be blind.
func TestHistoryIsJudged(t *testing.T) {
	warm := event{kind: eventWarm}
	released := event{kind: eventReleased}
	to := func(function, claim string) event {
		return event{kind: eventAssigned, function: function, claim: claim}
	}
	frozen := func(claim string) event { return event{kind: eventAssigned, function: "f", claim: claim, keeps: true} }
	type op struct {
		call, end int64
		event
	}
	for name, test := range map[string]struct {
		right bool
		ops   []op
	}{
		"once":                         {true, []op{{1, 2, warm}, {3, 4, to("f", "1")}, {5, 6, to("f", "1")}, {7, 8, released}}},
		"seen warm while it is given":  {true, []op{{1, 9, to("f", "1")}, {3, 4, warm}}},
		"seen given before the answer": {true, []op{{1, 9, to("f", "1")}, {3, 4, to("f", "1")}}},
		"twice":                        {false, []op{{1, 2, to("f", "1")}, {3, 4, to("f", "2")}}},
		"twice at once":                {false, []op{{1, 9, to("f", "1")}, {1, 9, to("g", "2")}}},
		"warm again":                   {false, []op{{1, 2, to("f", "1")}, {3, 4, warm}}},
		"given after it was returned":  {false, []op{{1, 2, to("f", "1")}, {3, 4, released}, {5, 6, to("f", "1")}}},
		"thawed":                       {true, []op{{1, 2, frozen("1")}, {3, 4, frozen("2")}}},
		"thawed for another":           {false, []op{{1, 2, frozen("1")}, {3, 4, to("g", "2")}}},
	} {
		h := newHistory()
		for _, o := range test.ops {
			o.event.instance = "i"
			h.ops = append(h.ops, porcupine.Operation{Input: o.event, Call: o.call, Return: o.end})
		}
		if faults := h.faults(); (len(faults) == 0) != test.right {
			t.Errorf("%s: right %v, faults %v", name, test.right, faults)
		}
	}
	h := newHistory()
	for _, id := range []string{"i", "j"} {
		h.note(0, event{kind: eventAssigned, instance: id, function: "f", claim: "1"})
	}
	if len(h.faults()) != 1 {
		t.Errorf("a claim of two instances: %v", h.faults())
	}
}
