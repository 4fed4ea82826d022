package pool

import (
	"cmp"
	"slices"
	"time"
)

const (
	// demandParallel is how many Instances of a kind a node makes at once while allocations wait for them.
	demandParallel = 4
	// settle is how long refill keeps away from a node after an activation, so that the first request has it to itself; patience
	// is how long it keeps away from one activation that does not end, or lets one creation keep off the next.
	settle   = 200 * time.Millisecond
	patience = 2 * time.Second
)

// shelf is what a decision about one node's pool needs to know of one kind of Instance.
type shelf struct {
	kind kind
	// size is how many are wanted; demand is how many allocations wait for that the node is to make now.
	size, demand int
	// warm Instances to spare, and those that are being made.
	warm, making int
	// closed: none can be made now. retry is when creations may go on after failures.
	closed bool
	retry  time.Time
}

// stock is what it needs to know of the node.
type stock struct {
	shelves []shelf
	// newest is when the last creation began that is still under way.
	newest time.Time
	// activating claims are under way on the node; began and ended are when the last one did.
	activating   int
	began, ended time.Time
}

// refillPlan is a number of Instances to make and to give up for each shelf, and when to look again if that may change by time alone.
type refillPlan struct {
	make, surplus []int
	again         time.Time
}

// refill keeps the wanted number of each kind warm on a node. Those that allocations wait for (demand) come first and several at a
// time; the rest comes one at a time over all kinds, the emptiest first, when no claim is under way. What is being made counts, so
// that it never makes too many. More than twice the size are too many: some may stay that were made for callers who went away.
// One that cannot be made, or takes long, does not keep the others waiting.
func refill(now time.Time, s stock) refillPlan {
	p := refillPlan{make: make([]int, len(s.shelves)), surplus: make([]int, len(s.shelves))}
	busy := false
	for n, k := range s.shelves {
		switch {
		case k.warm > 2*k.size && k.demand == 0:
			p.surplus[n] = k.warm - k.size
		case k.demand <= 0 || k.closed:
		case now.Before(k.retry):
			p.at(k.retry)
		default:
			p.make[n] = max(0, min(k.demand-k.making, demandParallel-k.making))
			busy = busy || p.make[n] > 0
		}
	}
	if busy {
		return p
	}
	next := p.emptiest(now, s.shelves)
	if next < 0 {
		return p
	}
	if at := quiet(s); now.Before(at) {
		p.at(at)
		return p
	}
	p.make[next] = 1
	return p
}

// emptiest is the shelf that lacks the largest part of what is wanted of it, or -1.
func (p *refillPlan) emptiest(now time.Time, shelves []shelf) int {
	best, least := -1, 1.0
	for n, k := range shelves {
		if k.closed || k.demand > 0 || k.making > 0 || k.warm >= k.size {
			continue
		}
		if now.Before(k.retry) {
			p.at(k.retry)
			continue
		}
		if full := float64(k.warm) / float64(k.size); full < least {
			best, least = n, full
		}
	}
	return best
}

func (p *refillPlan) at(t time.Time) {
	if p.again.IsZero() || t.Before(p.again) {
		p.again = t
	}
}

// quiet is when refill may begin beside the claims and the creations of a node.
func quiet(s stock) (at time.Time) {
	switch {
	case s.activating > 0:
		at = s.began.Add(patience)
	case !s.ended.IsZero():
		at = s.ended.Add(settle)
	}
	if !s.newest.IsZero() {
		at = slices.MaxFunc([]time.Time{at, s.newest.Add(patience)}, time.Time.Compare)
	}
	return at
}

// spread divides need over nodes: each next one goes to the node that makes and holds least.
func spread(need int, nodes map[string]int) map[string]int {
	out := make(map[string]int, len(nodes))
	for ; need > 0 && len(nodes) > 0; need-- {
		least := ""
		for name, load := range nodes {
			if least == "" || cmp.Or(cmp.Compare(load+out[name], nodes[least]+out[least]), cmp.Compare(name, least)) < 0 {
				least = name
			}
		}
		out[least]++
	}
	return out
}

// backoff doubles from first with each failure, up to most.
func backoff(failures int, first, most time.Duration) time.Duration {
	return min(first<<min(max(failures-1, 0), 20), most)
}
