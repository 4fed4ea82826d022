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
		if got := choose(c.all); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
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
		{"fewest claims", []turn{{"a", 2, t0}, {"b", 1, t0.Add(1)}}, 1},
		{"longest wait", []turn{{"a", 1, t0.Add(1)}, {"b", 1, t0}}, 1},
		{"at its limit", []turn{{"a", 4, t0}}, -1},
	} {
		if got := fairest(c.turns, 4); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestRefill(t *testing.T) {
	for _, c := range []struct {
		name   string
		demand int
		s      stock
		want   refillPlan
	}{
		{"empty", 0, stock{}, refillPlan{make: 1}},
		{"one at a time", 0, stock{making: 1}, refillPlan{}},
		{"what is made counts", 0, stock{warm: 2, making: 1}, refillPlan{}},
		{"full", 0, stock{warm: 3}, refillPlan{}},
		{"some more may stay", 0, stock{warm: 6}, refillPlan{}},
		{"too many", 0, stock{warm: 7}, refillPlan{surplus: 4}},
		{"demand comes in parallel", 9, stock{}, refillPlan{make: demandParallel}},
		{"demand that is being made", 2, stock{making: 2}, refillPlan{}},
		{"demand does not wait for claims", 1, stock{activating: 3, began: t0}, refillPlan{make: 1}},
		{"below claims", 0, stock{activating: 1, began: t0}, refillPlan{again: t0.Add(patience)}},
		{"a claim that takes long", 0, stock{activating: 1, began: t0.Add(-patience)}, refillPlan{make: 1}},
		{"the first request has the node", 0, stock{ended: t0}, refillPlan{again: t0.Add(settle)}},
		{"backs off", 5, stock{retry: t0.Add(time.Second)}, refillPlan{again: t0.Add(time.Second)}},
	} {
		if got := refill(t0, 3, c.demand, c.s); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestRefillNeverMakesTooMany(t *testing.T) {
	for size := range 5 {
		for demand := range 8 {
			for warm := range 12 {
				for making := range 8 {
					got := refill(t0, size, demand, stock{warm: warm, making: making})
					if got.make > 0 && making+got.make > max(demand, size-warm) {
						t.Fatalf("size %d demand %d warm %d making %d: makes %d", size, demand, warm, making, got.make)
					}
					if got.make > 0 && got.surplus > 0 || got.surplus > warm {
						t.Fatalf("size %d demand %d warm %d making %d: %+v", size, demand, warm, making, got)
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
