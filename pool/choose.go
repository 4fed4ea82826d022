package pool

import (
	"cmp"
	"iter"
	"slices"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// candidate is an Instance that a Revision may claim: of those on one node that are alike, the oldest.
type candidate struct {
	id      string
	of      *instance
	degree  hearthv1.Degree
	image   bool // the Revision's image is on its node
	beside  int  // Instances of the Function that are on its node
	inZone  int  // and in its zone
	spares  int  // Instances to spare on its node
	created time.Time
}

// warmth orders candidates: by degree, and among equals those on whose node the Revision's image or code is come first.
func (c candidate) warmth() int {
	w := 2 * int(c.degree)
	if c.image {
		w++
	}
	return w
}

// choose returns the best candidate, if there is any: the warmest, then the one with fewest of its Function's Instances beside it,
// so that they do not fail together, then the one whose node has most to spare, then the oldest.
func choose(candidates iter.Seq[candidate]) (best candidate, ok bool) {
	for c := range candidates {
		if !ok || better(c, best) {
			best, ok = c, true
		}
	}
	return best, ok
}

func better(a, b candidate) bool {
	return cmp.Or(cmp.Compare(b.warmth(), a.warmth()), cmp.Compare(a.inZone, b.inZone), cmp.Compare(a.beside, b.beside),
		cmp.Compare(b.spares, a.spares), a.created.Compare(b.created), cmp.Compare(a.id, b.id)) < 0
}

// turn is a Function that waits for an Instance.
type turn struct {
	function string
	inFlight int       // claims of it under way
	waiting  time.Time // since when its first allocation waits
	queue    []*allocation
}

// fairest returns the index of the Function whose turn it is, or -1 if all have as many claims under way as they may. The Function
// with the fewest comes first: when Instances are scarce one Function's burst takes what nobody else asks for, and every other
// Function gets the next one. cap bounds a Function's claims under way, so that there is always room for others on the nodes.
func fairest(turns []turn, limit int) int {
	best := -1
	for i, t := range turns {
		if t.inFlight >= limit {
			continue
		}
		if best < 0 || cmp.Or(cmp.Compare(t.inFlight, turns[best].inFlight), t.waiting.Compare(turns[best].waiting)) < 0 {
			best = i
		}
	}
	return best
}

// serving is an Instance that may be given up.
type serving struct {
	id       string
	inFlight int
	since    time.Time
}

// shrink chooses n Instances to give up: those with the fewest requests in flight, then the youngest. One that has served for less
// than minAge stays: somebody has just asked for it, and has not been measured yet.
func shrink(now time.Time, all []serving, n int, minAge time.Duration) []string {
	old := slices.DeleteFunc(slices.Clone(all), func(s serving) bool { return now.Sub(s.since) < minAge })
	slices.SortFunc(old, func(a, b serving) int {
		return cmp.Or(cmp.Compare(a.inFlight, b.inFlight), b.since.Compare(a.since), cmp.Compare(a.id, b.id))
	})
	var ids []string
	for _, s := range old[:max(0, min(n, len(old)))] {
		ids = append(ids, s.id)
	}
	return ids
}
