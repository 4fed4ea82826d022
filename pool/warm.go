package pool

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// makeTime bounds the creation of a warm Instance, the boot of its Runtime included.
const makeTime = time.Minute

// kinds of warm Instances: sandboxes first, then the Runtimes in the order of their names.
func (m *Manager) kinds() []shelf {
	all := []shelf{{}}
	for _, name := range slices.Sorted(maps.Keys(m.runtimes)) {
		if r := m.runtimes[name]; r.current != nil {
			all = append(all, shelf{kind: r.kind()})
		}
	}
	return all
}

// unsettle has the next step look at a node's stock. Whoever changes something that it follows from calls it: place does for Instances.
func (m *Manager) unsettle(n *node) {
	if n != nil {
		n.unsettled = true
	}
}

// lookAgain has a node's stock looked at when that may change by time alone.
func (m *Manager) lookAgain(n *node, t time.Time) {
	if n.again.IsZero() || t.Before(n.again) {
		n.again = t
	}
	m.at(n.again)
}

// unsettled lists the nodes to look at: those of which something changed or whose time has come, or all while allocations wait for what
// is to be made on any, and once after that. Most nodes stand still while a few are claimed from.
func (m *Manager) unsettled(now time.Time, waiting bool) (all []*node) {
	everywhere := waiting || m.waited
	m.waited = waiting
	for _, n := range m.nodes {
		switch due := !n.again.IsZero() && !now.Before(n.again); {
		case everywhere || n.unsettled || due:
			n.unsettled, n.again = false, time.Time{}
			all = append(all, n)
		case !n.again.IsZero():
			m.at(n.again)
		}
	}
	return all
}

// refillNodes begins and ends warm Instances.
func (m *Manager) refillNodes(now time.Time) {
	waiting := m.waiting(now)
	nodes := m.unsettled(now, len(waiting) > 0)
	if len(nodes) == 0 {
		return
	}
	m.giveUpOld(now, nodes)
	shelves := m.kinds()
	stocks := m.stocks(now, nodes, shelves, waiting)
	for n, k := range shelves {
		m.demand(stocks, n, waiting[k.kind])
	}
	for _, s := range stocks {
		for n := len(shelves); n < len(s.shelves); n++ { // of its pods
			k := &s.shelves[n]
			k.demand = max(k.making, waiting[k.kind]-k.warm)
		}
	}
	for name, s := range stocks {
		plan := refill(now, *s)
		if !plan.again.IsZero() {
			m.lookAgain(m.nodes[name], plan.again)
		}
		for n, k := range s.shelves {
			for range plan.make[n] {
				m.makeWarm(now, m.nodes[name], k.kind)
			}
			m.giveUp(now, place{name, k.kind}, plan.surplus[n])
		}
	}
}

// waiting counts what allocations wait for.
func (m *Manager) waiting(now time.Time) map[kind]int {
	out, seats := map[kind]int{}, seating{}
	for _, a := range m.eligible(now) {
		k := m.kindFor(a.function).ground()
		if f := m.functions[a.function]; f != nil {
			if pod := m.seat(now, seats, f); pod != "" {
				k = m.kindFor(a.function).in(pod)
			}
		}
		out[k]++
	}
	return out
}

// kindFor is what a Function needs, in a pod of its group if it has one and there is one.
func (m *Manager) kindFor(function string) kind {
	f := m.functions[function]
	if f == nil {
		return kind{}
	}
	k := kind{}
	if r := m.runtimes[f.spec.GetRuntime()]; r != nil {
		k = r.kind()
	}
	k.group = groupOf(f.spec)
	return k
}

// stocks is what there is on those of the nodes that are connected.
func (m *Manager) stocks(now time.Time, nodes []*node, shelves []shelf, waiting map[kind]int) map[string]*stock {
	all := map[string]*stock{}
	for _, n := range nodes {
		if !n.synced {
			continue
		}
		s := &stock{shelves: slices.Concat(shelves, m.podShelves(n, waiting)), began: n.began, ended: n.ended}
		for c := range s.shelves {
			k := &s.shelves[c]
			if c < len(shelves) {
				k.size = m.size(n, k.kind.runtime)
			}
			k.warm = len(m.index.spare.at(place{n.name, k.kind}))
			k.retry = n.supply(k.kind.runtime).retry
			k.closed = n.info.Cordoned || n.info.Unready || !m.ready(now, n, k.kind)
		}
		all[n.name] = s
	}
	for i := range m.index.restless {
		if s := all[i.node]; s != nil {
			s.add(i)
		}
	}
	return all
}

// add counts an Instance that something is under way with.
func (s *stock) add(i *instance) {
	c := slices.IndexFunc(s.shelves, func(k shelf) bool { return k.kind == i.kind })
	switch {
	case i.by != nil:
		s.activating++
	case i.discard != nil || i.state > hearthv1.State_STATE_WARM || c < 0:
	case i.making:
		s.shelves[c].making++
		if i.spare() {
			s.shelves[c].warm-- // the stream was faster than the answer
		}
		if i.begun.After(s.newest) {
			s.newest = i.begun
		}
	case i.state == hearthv1.State_STATE_CREATING:
		s.shelves[c].making++
	}
}

// demand divides what waits for a kind over the nodes, less what is there or under way.
func (m *Manager) demand(stocks map[string]*stock, shelf, waiting int) {
	loads := map[string]int{}
	for name, s := range stocks {
		k := s.shelves[shelf]
		if !k.closed {
			loads[name] = k.making
		}
		waiting -= k.making + k.warm
	}
	for name, share := range spread(max(0, waiting), loads) {
		k := &stocks[name].shelves[shelf]
		k.demand = share + k.making
	}
}

// giveUpOld ends Instances of Runtimes that were changed or deleted.
func (m *Manager) giveUpOld(now time.Time, nodes []*node) {
	for _, n := range nodes {
		for i := range m.index.nodes[n.name] {
			if i.spare() && !m.current(i.kind) {
				m.startDiscard(now, i)
			}
		}
	}
}

// current says whether a kind is one of now.
func (m *Manager) current(k kind) bool {
	if k.runtime == "" {
		return true
	}
	r := m.runtimes[k.runtime]
	return r != nil && r.current != nil && r.kind() == k.ground()
}

func (m *Manager) makeWarm(now time.Time, n *node, k kind) {
	i := &instance{id: newID("i-"), node: n.name, making: true, gone: make(chan struct{}), created: now, begun: now,
		degree: hearthv1.Degree_DEGREE_SANDBOX, kind: k}
	req := &hearthv1.CreateInstanceRequest{Id: i.id}
	if k.pod != "" {
		i.pod, i.group = k.pod, k.group
		req.Pod, req.Tenant, req.Group = k.pod, k.group.tenant, k.group.name
	}
	if k.runtime != "" {
		i.degree = hearthv1.Degree_DEGREE_RUNTIME
		req.Runtime = m.runtimes[k.runtime].current
	}
	req.Degree = i.degree
	m.add(i)
	m.call(n, func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, makeTime)
		defer cancel()
		said, err := n.client.CreateInstance(ctx, req)
		if err == nil && said.GetId() != i.id {
			err = fmt.Errorf("node %s made instance %q and not %q", n.name, said.GetId(), i.id)
		}
		m.fact(func(now time.Time) { m.made(now, n, i, k, said, err) })
	})
}

// made takes in the outcome of a creation. When it is unknown the node's stream will tell.
func (m *Manager) made(now time.Time, n *node, i *instance, k kind, said *hearthv1.Instance, err error) {
	defer m.place(i)
	defer m.tellStocked()
	i.making = false
	supply := &supply{} // of a Runtime that was changed or deleted meanwhile
	if m.current(k) {
		supply = n.supply(k.runtime)
	}
	if err == nil {
		supply.failures, supply.lastErr = 0, ""
		m.metrics.made.WithLabelValues("ok").Inc()
		if i.state < said.GetState() && i.state != hearthv1.State_STATE_GONE {
			m.observe(now, n, i.session, said)
		}
		return
	}
	m.metrics.made.WithLabelValues("error").Inc()
	if k.pod != "" {
		m.shutPod(now, k)
	} else {
		supply.failed(now, err)
	}
	if n.synced {
		m.log.Warn("make a warm instance", "node", n.name, "instance", i.id, "runtime", k.runtime, "pod", k.pod, "failures", supply.failures, "err", err)
	}
	switch {
	case i.state == hearthv1.State_STATE_GONE:
	case i.session == 0:
		m.remove(now, i)
	case i.state < hearthv1.State_STATE_WARM:
		m.startDiscard(now, i)
	}
}

// giveUp ends n spare Instances, the youngest first.
func (m *Manager) giveUp(now time.Time, p place, n int) {
	if n <= 0 {
		return
	}
	var all []*instance
	for i := range m.index.spare.at(p) {
		if !i.refused && !i.making {
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b *instance) int { return cmp.Or(b.created.Compare(a.created), cmp.Compare(a.id, b.id)) })
	for _, i := range all[:min(n, len(all))] {
		m.startDiscard(now, i)
	}
}

// supplyErrors says which nodes cannot make Instances of a kind, and why.
func (m *Manager) supplyErrors(runtime string) (errs []string) {
	for _, name := range slices.Sorted(maps.Keys(m.nodes)) {
		if s := m.nodes[name].supplies[runtime]; s != nil && s.lastErr != "" {
			errs = append(errs, fmt.Sprintf("node %s: %s", name, s.lastErr))
		}
	}
	return errs
}
