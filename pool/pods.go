package pool

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// DefaultPodWorkers and DefaultPodMemoryBytes bound a pod that Functions share.
	DefaultPodWorkers     = 8
	DefaultPodMemoryBytes = 4 << 30
	// defaultMemory is what counts for a Function that names no limit: what nodes give it unless they are told otherwise.
	defaultMemory = 1 << 30
	// shutTime is how long a pod is left alone in which no worker could be made.
	shutTime = 5 * time.Second
)

// group is what Functions share pods by; the zero value is that of one that shares none. Groups of one name and of two tenants have
// nothing in common.
type group struct{ tenant, name string }

func groupOf(spec *hearthv1.FunctionSpec) group {
	if spec.GetGroup() == "" {
		return group{}
	}
	return group{spec.GetTenant(), spec.GetGroup()}
}

// pod is a group's, as a decision sees it.
type pod struct {
	id      string
	workers int   // in it, or on their way
	memory  int64 // that its Functions may take
	free    map[kind]int
	holds   map[string]bool // Revisions
	shut    bool
}

// worker is what a Function wants of a pod.
type worker struct {
	kind     kind // with no pod yet
	revision string
	memory   int64
}

// podBounds are those of every pod.
type podBounds struct {
	workers int
	memory  int64
}

// seat returns the index of the pod that a worker should be in, or -1 for one of its own, and why: the one with most workers that has
// room, so that few are needed and the emptiest end. A pod holds a Revision once, for it shares what two Instances of it would have
// in common, and ends with it.
func (b podBounds) seat(pods []pod, w worker) (best int, reason string) {
	best = -1
	reason = "the group has no pod yet"
	for n, p := range pods {
		switch k := w.kind.in(p.id); {
		case p.shut:
			reason = fmt.Sprintf("pod %s takes none at present", p.id)
		case p.holds[w.revision]:
			reason = fmt.Sprintf("pod %s has one already", p.id)
		case p.free[k] == 0 && p.workers >= b.workers:
			reason = fmt.Sprintf("pod %s has its %d workers", p.id, p.workers)
		case p.memory+w.memory > b.memory:
			reason = fmt.Sprintf("pod %s has %d of %d bytes left", p.id, b.memory-p.memory, b.memory)
		case best < 0 || cmp.Or(cmp.Compare(p.workers, pods[best].workers), cmp.Compare(pods[best].id, p.id)) > 0:
			best = n
		}
	}
	if best >= 0 {
		p := pods[best]
		reason = fmt.Sprintf("pod %s has %d of %d workers, and %d of %d bytes", p.id, p.workers, b.workers, p.memory, b.memory)
	}
	return best, reason
}

// take counts a worker that will be there.
func (p *pod) take(w worker) {
	if k := w.kind.in(p.id); p.free[k] > 0 {
		p.free[k]--
	} else {
		p.workers++
	}
	p.memory += w.memory
	p.holds[w.revision] = true
}

// seating is the pods of all groups while decisions are taken one after the other.
type seating map[group][]pod

// seat decides for one Function that waits, and counts it. What it returns is empty for a pod of its own.
func (m *Manager) seat(now time.Time, s seating, f *function) string {
	g := groupOf(f.spec)
	if g == (group{}) {
		return ""
	}
	if _, known := s[g]; !known {
		s[g] = m.podsOf(now, g)
	}
	w := worker{m.kindFor(f.name), f.revision.GetName(), memoryOf(f)}
	best, reason := podBounds{m.config.PodWorkers, m.config.PodMemoryBytes}.seat(s[g], w)
	m.log.Debug("seat", "function", f.name, "tenant", g.tenant, "group", g.name, "reason", reason)
	if best < 0 {
		return ""
	}
	s[g][best].take(w)
	return s[g][best].id
}

func memoryOf(f *function) int64 {
	if n := f.spec.GetResources().GetMemoryBytes(); n > 0 {
		return n
	}
	return defaultMemory
}

// podsOf lists a group's pods on nodes that are there, by name.
func (m *Manager) podsOf(now time.Time, g group) []pod {
	found := map[string]*pod{}
	for i := range m.index.groups[g] {
		if n := m.nodes[i.node]; n == nil || !n.synced || i.discard != nil {
			continue
		}
		p := found[i.podID()]
		if p == nil {
			p = &pod{id: i.podID(), free: map[kind]int{}, holds: map[string]bool{}}
			found[p.id] = p
		}
		m.countIn(now, p, i)
	}
	pods := make([]pod, 0, len(found))
	for _, p := range found {
		pods = append(pods, *p)
	}
	slices.SortFunc(pods, func(a, b pod) int { return cmp.Compare(a.id, b.id) })
	return pods
}

// countIn counts one Instance of a pod.
func (m *Manager) countIn(now time.Time, p *pod, i *instance) {
	p.workers++
	name, revision := i.function, i.revision
	if i.by != nil {
		name = i.by.function
		if f := m.functions[name]; f != nil {
			revision = f.revision.GetName()
		}
	}
	if f := m.functions[name]; f != nil {
		p.memory += memoryOf(f)
		p.holds[revision] = true
	}
	if i.spare() || i.making && i.by == nil {
		p.free[i.kind]++
	}
	until := i.shut
	if i.making { // one that takes long keeps nobody else
		until = i.begun.Add(patience)
		p.shut = p.shut || !now.Before(until)
	} else {
		p.shut = p.shut || now.Before(until)
	}
	if now.Before(until) {
		m.at(until)
	}
}

// shutPod keeps workers out of a pod in which one could not be made.
func (m *Manager) shutPod(now time.Time, k kind) {
	for i := range m.index.groups[k.group] {
		if i.podID() == k.pod {
			i.shut = now.Add(shutTime)
		}
	}
}

// podShelves are what there is and what is to be made in a node's shared pods.
func (m *Manager) podShelves(n *node, waiting map[kind]int) []shelf {
	var all []shelf
	seen := map[kind]bool{}
	for i := range m.index.nodes[n.name] {
		if i.at.group == (group{}) {
			continue
		}
		for _, k := range append(m.waitingIn(i.podID(), waiting), i.kind) {
			if k.pod != "" && !seen[k] && m.current(k) {
				seen[k] = true
				all = append(all, shelf{kind: k, size: waiting[k]})
			}
		}
	}
	slices.SortFunc(all, func(a, b shelf) int {
		return cmp.Or(cmp.Compare(a.kind.pod, b.kind.pod), cmp.Compare(a.kind.runtime, b.kind.runtime))
	})
	return all
}

// waitingIn lists the kinds that wait to be made in a pod.
func (*Manager) waitingIn(pod string, waiting map[kind]int) (kinds []kind) {
	for k := range waiting {
		if k.pod == pod {
			kinds = append(kinds, k)
		}
	}
	return kinds
}
