package pool

import (
	"time"
)

const (
	// demandParallel is how many sandboxes a node makes at once while allocations wait for them.
	demandParallel = 4
	// settle is how long refill keeps away from a node after an activation, so that the first request has it to itself; patience
	// is how long it keeps away from one activation that does not end.
	settle   = 200 * time.Millisecond
	patience = 2 * time.Second
)

// stock is what a decision about one node's pool needs to know of it.
type stock struct {
	// warm Instances to spare, and those that are being made.
	warm, making int
	// activating claims are under way on the node; began and ended are when the last one did.
	activating   int
	began, ended time.Time
	// retry is when creations may go on after failures.
	retry time.Time
}

// refillPlan is a number of Instances to make or to give up, and when to look again if that may change by time alone.
type refillPlan struct {
	make, surplus int
	again         time.Time
}

// refill keeps size Instances warm on a node. Those that allocations wait for (demand) come first and several at a time; the rest
// comes one at a time, when no claim is under way. What is being made counts, so that it never makes too many. More than
// twice the size are too many: some may stay that were made for callers who went away.
func refill(now time.Time, size, demand int, s stock) refillPlan {
	if s.warm > 2*size && demand == 0 {
		return refillPlan{surplus: s.warm - size}
	}
	wanted := demand
	if wanted <= 0 {
		wanted = size - s.warm
	}
	if wanted -= s.making; wanted <= 0 {
		return refillPlan{}
	}
	if now.Before(s.retry) {
		return refillPlan{again: s.retry}
	}
	if demand > 0 {
		return refillPlan{make: max(0, min(wanted, demandParallel-s.making))}
	}
	if s.making > 0 {
		return refillPlan{}
	}
	if at := quiet(s); now.Before(at) {
		return refillPlan{again: at}
	}
	return refillPlan{make: 1}
}

// quiet is when refill may begin beside the claims of a node.
func quiet(s stock) time.Time {
	if s.activating > 0 {
		return s.began.Add(patience)
	}
	if s.ended.IsZero() {
		return time.Time{}
	}
	return s.ended.Add(settle)
}

// spread divides need over nodes: each next one goes to the node that makes and holds least.
func spread(need int, nodes map[string]int) map[string]int {
	out := make(map[string]int, len(nodes))
	for ; need > 0 && len(nodes) > 0; need-- {
		least := ""
		for name, load := range nodes {
			if least == "" || load+out[name] < nodes[least]+out[least] || load+out[name] == nodes[least]+out[least] && name < least {
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
