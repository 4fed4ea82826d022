package pool

import (
	"slices"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func TestChoose(t *testing.T) {
	sandbox, runtime, revision := hearthv1.Degree_DEGREE_SANDBOX, hearthv1.Degree_DEGREE_RUNTIME, hearthv1.Degree_DEGREE_REVISION
	for _, c := range []struct {
		name string
		all  []candidate
		want int
	}{
		{"none", nil, -1},
		{"degree beats all", []candidate{{id: "a", degree: sandbox, image: true, spares: 9}, {id: "b", degree: runtime}, {id: "c", degree: revision}}, 2},
		{"image on the node", []candidate{{id: "a", degree: sandbox, spares: 9}, {id: "b", degree: sandbox, image: true}}, 1},
		{"node with most spares", []candidate{{id: "a", degree: sandbox, spares: 1}, {id: "b", degree: sandbox, spares: 2}}, 1},
		{"oldest", []candidate{{id: "a", created: t0.Add(1)}, {id: "b", created: t0}}, 1},
		{"the same for ever", []candidate{{id: "b"}, {id: "a"}}, 1},
	} {
		if got, ok := choose(slices.Values(c.all)); ok != (c.want >= 0) || ok && got != c.all[c.want] {
			t.Errorf("%s: %v %v, want %d", c.name, got, ok, c.want)
		}
	}
}

func TestFairest(t *testing.T) {
	for _, c := range []struct {
		name  string
		turns []turn
		want  int
	}{
		{"nobody", nil, -1},
		{"fewest claims", []turn{{function: "a", inFlight: 2, waiting: t0}, {function: "b", inFlight: 1, waiting: t0.Add(1)}}, 1},
		{"longest wait", []turn{{function: "a", inFlight: 1, waiting: t0.Add(1)}, {function: "b", inFlight: 1, waiting: t0}}, 1},
		{"at its limit", []turn{{function: "a", inFlight: 4, waiting: t0}}, -1},
	} {
		if got := fairest(c.turns, 4); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestRefill(t *testing.T) {
	python := kind{runtime: "python", generation: 1}
	of := func(s ...shelf) stock { return stock{shelves: s} }
	plan := func(n ...int) refillPlan { return refillPlan{make: n} }
	for _, c := range []struct {
		name string
		s    stock
		want refillPlan
	}{
		{"empty", of(shelf{size: 3}), plan(1)},
		{"one at a time", of(shelf{size: 3, making: 1}), plan(0)},
		{"what is made counts", of(shelf{size: 3, warm: 2, making: 1}), plan(0)},
		{"full", of(shelf{size: 3, warm: 3}), plan(0)},
		{"some more may stay", of(shelf{size: 3, warm: 6}), plan(0)},
		{"too many", of(shelf{size: 3, warm: 7}), refillPlan{make: []int{0}, surplus: []int{4}}},
		{"none is wanted any more", of(shelf{kind: python, warm: 1}), refillPlan{make: []int{0}, surplus: []int{1}}},
		{"demand comes in parallel", of(shelf{size: 3, demand: 9}), plan(demandParallel)},
		{"demand that is being made", of(shelf{size: 3, demand: 2, making: 2}), plan(0)},
		{"demand does not wait for claims", stock{shelves: []shelf{{size: 3, demand: 1}}, activating: 3, began: t0}, plan(1)},
		{"below claims", stock{shelves: []shelf{{size: 3}}, activating: 1, began: t0}, refillPlan{make: []int{0}, again: t0.Add(patience)}},
		{"a claim that takes long", stock{shelves: []shelf{{size: 3}}, activating: 1, began: t0.Add(-patience)}, plan(1)},
		{"the first request has the node", stock{shelves: []shelf{{size: 3}}, ended: t0}, refillPlan{make: []int{0}, again: t0.Add(settle)}},
		{"backs off", of(shelf{size: 3, demand: 5, retry: t0.Add(time.Second)}), refillPlan{make: []int{0}, again: t0.Add(time.Second)}},
		{"the emptiest first", of(shelf{size: 4, warm: 2}, shelf{kind: python, size: 4, warm: 1}), plan(0, 1)},
		{"demand of another first", of(shelf{size: 3}, shelf{kind: python, demand: 1}), plan(0, 1)},
		{"one creation at a time", stock{shelves: []shelf{{size: 3}, {kind: python, size: 1, making: 1}}, newest: t0},
			refillPlan{make: []int{0, 0}, again: t0.Add(patience)}},
		{"a creation that takes long", stock{shelves: []shelf{{size: 3}, {kind: python, size: 1, making: 1}}, newest: t0.Add(-patience)}, plan(1, 0)},
		{"one that does not boot stops no other", of(shelf{size: 3}, shelf{kind: python, demand: 1, retry: t0.Add(time.Second)}),
			refillPlan{make: []int{1, 0}, again: t0.Add(time.Second)}},
		{"an image that is not there yet", of(shelf{kind: python, size: 3, demand: 1, closed: true}), plan(0)},
	} {
		got := refill(t0, c.s)
		if c.want.surplus == nil {
			c.want.surplus = make([]int, len(c.s.shelves))
		}
		if !slices.Equal(got.make, c.want.make) || !slices.Equal(got.surplus, c.want.surplus) || !got.again.Equal(c.want.again) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestRefillNeverMakesTooMany(t *testing.T) {
	for size := range 5 {
		for demand := range 8 {
			for warm := range 12 {
				for making := range 8 {
					p := refill(t0, stock{shelves: []shelf{{size: size, demand: demand, warm: warm, making: making}}})
					create, surplus := p.make[0], p.surplus[0]
					if create > 0 && making+create > max(demand, size-warm) {
						t.Fatalf("size %d demand %d warm %d making %d: makes %d", size, demand, warm, making, create)
					}
					if create > 0 && surplus > 0 || surplus > warm {
						t.Fatalf("size %d demand %d warm %d making %d: %+v", size, demand, warm, making, p)
					}
				}
			}
		}
	}
}

func TestSpread(t *testing.T) {
	got := spread(5, map[string]int{"a": 0, "b": 2, "c": 9})
	if got["a"] != 4 || got["b"] != 1 || got["c"] != 0 {
		t.Errorf("%v", got)
	}
	if got := spread(3, nil); len(got) != 0 {
		t.Errorf("%v", got)
	}
}

func TestShrink(t *testing.T) {
	all := []serving{{"busy", 5, t0}, {"old", 0, t0}, {"young", 0, t0.Add(time.Minute)}, {"new", 0, t0.Add(time.Hour)}}
	now := t0.Add(time.Hour)
	for n, want := range [][]string{nil, {"young"}, {"young", "old"}, {"young", "old", "busy"}, {"young", "old", "busy"}} {
		if got := shrink(now, all, n, minAge); !slices.Equal(got, want) {
			t.Errorf("%d: %v, want %v", n, got, want)
		}
	}
}

func TestDrained(t *testing.T) {
	for _, c := range []struct {
		name string
		d    drain
		all  []acknowledgement
		want bool
	}{
		{"nobody watches", drain{version: 5}, nil, true},
		{"nobody was told", drain{}, nil, false},
		{"all know", drain{version: 5}, []acknowledgement{{5, 0}, {9, 0}}, true},
		{"one does not know", drain{version: 5}, []acknowledgement{{5, 0}, {4, 0}}, false},
		{"one is busy there", drain{version: 5}, []acknowledgement{{5, 1}}, false},
	} {
		if got := drained(c.d, c.all); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}

func TestSeat(t *testing.T) {
	bounds := podBounds{workers: 3, memory: 1000}
	w := worker{kind: kind{runtime: "python"}, revision: "x-1", memory: 100}
	for _, c := range []struct {
		name string
		pods []pod
		want int
	}{
		{"none", nil, -1},
		{"room", []pod{{id: "p", workers: 2, memory: 900}}, 0},
		{"full", []pod{{id: "p", workers: 3}}, -1},
		{"full, but one waits there", []pod{{id: "p", workers: 3, free: map[kind]int{{runtime: "python", pod: "p"}: 1}}}, 0},
		{"another kind waits there", []pod{{id: "p", workers: 3, free: map[kind]int{{pod: "p"}: 1}}}, -1},
		{"memory", []pod{{id: "p", memory: 901}}, -1},
		{"the same there already", []pod{{id: "p", holds: map[string]bool{"x-1": true}}}, -1},
		{"shut", []pod{{id: "p", shut: true}}, -1},
		{"the fullest", []pod{{id: "p", workers: 1}, {id: "q", workers: 2}, {id: "r", workers: 3}}, 1},
		{"the same for ever", []pod{{id: "p", workers: 1}, {id: "q", workers: 1}}, 0},
	} {
		if got, reason := bounds.seat(c.pods, w); got != c.want || reason == "" {
			t.Errorf("%s: %d (%s), want %d", c.name, got, reason, c.want)
		}
	}
}
