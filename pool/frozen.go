package pool

import (
	"cmp"
	"context"
	"slices"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// freezeTime bounds a call of Freeze. It is a write to the freezer; what takes longer does not work.
const freezeTime = 10 * time.Second

// mayFreeze says whether a Function may keep an Instance frozen that it does not need: one of its present Revision, which a claim
// could use as it is, as long as it does not have enough of them.
func (m *Manager) mayFreeze(f *function, i *instance) bool {
	if m.config.FrozenTTL < 0 || !m.nodes[i.node].synced || !m.claimableBy(f, i) {
		return false
	}
	kept := 0
	for other := range m.index.functions[f.name] {
		if other.discard == nil && (other.freezing || other.state == hearthv1.State_STATE_FROZEN) {
			kept++
		}
	}
	return kept < f.scaling.frozen
}

// claimableBy says whether what an Instance holds is what its Function would start now.
func (m *Manager) claimableBy(f *function, i *instance) bool {
	return f != nil && !f.deleting && i.function == f.name && i.revision == f.revision.GetName() && m.current(i.kind)
}

// frozenOf lists what a Function can be given by a thaw alone.
func (m *Manager) frozenOf(f *function) set {
	out := set{}
	for i := range m.index.functions[f.name] {
		if i.asleep() && m.claimableBy(f, i) {
			out[i] = struct{}{}
		}
	}
	return out
}

// freeze has a drained Instance frozen. Until the node has answered it is nobody's.
func (m *Manager) freeze(i *instance) {
	i.freezing = true
	n := m.nodes[i.node]
	m.call(n, func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, freezeTime)
		defer cancel()
		said, err := n.client.Freeze(ctx, &hearthv1.FreezeRequest{InstanceId: i.id, Epoch: m.epoch})
		m.fact(func(now time.Time) { m.froze(now, n, i, said, err) })
	})
}

// froze takes in the outcome. One that is unknown is not waited for: no request is there, and a frozen Instance is worth a start, not
// a doubt.
func (m *Manager) froze(now time.Time, n *node, i *instance, said *hearthv1.Instance, err error) {
	defer m.place(i)
	i.freezing = false
	if i.state == hearthv1.State_STATE_GONE {
		return
	}
	if err == nil && said.GetId() == i.id {
		m.observe(now, n, i.session, said)
	}
	switch {
	case i.discard != nil || i.state == hearthv1.State_STATE_GONE:
	case i.state == hearthv1.State_STATE_FROZEN && i.drain.end == toFreeze:
		i.drain = nil
		m.metrics.freezes.WithLabelValues("ok").Inc()
		m.place(i)
		if f := m.functions[i.function]; f != nil {
			m.thin(now, f)
		}
		return
	default:
		m.log.Warn("freeze", "instance", i.id, "function", i.function, "err", err)
		m.startDiscard(now, i)
	}
	m.metrics.freezes.WithLabelValues("error").Inc()
}

// slept notes that an Instance is frozen now.
func (m *Manager) slept(now time.Time, i *instance) {
	i.frozen = now
	m.keepFrom(now)
	m.place(i)
	f := m.functions[i.function]
	if f == nil || f.deleting {
		m.log.Info("discard a frozen instance of an unknown function", "instance", i.id, "function", i.function)
		m.startDiscard(now, i)
		return
	}
	m.thin(now, f)
}

// thin gives up what a Function may not keep frozen: what it would not start now, and the oldest of those that are too many.
func (m *Manager) thin(now time.Time, f *function) {
	var kept []*instance
	for i := range m.index.functions[f.name] {
		switch {
		case !i.asleep():
		case m.claimableBy(f, i):
			kept = append(kept, i)
		default:
			m.startDiscard(now, i)
		}
	}
	limit := f.scaling.frozen
	if m.config.FrozenTTL < 0 {
		limit = 0
	}
	slices.SortFunc(kept, func(a, b *instance) int { return cmp.Or(b.frozen.Compare(a.frozen), cmp.Compare(a.id, b.id)) })
	for _, i := range kept[min(limit, len(kept)):] {
		m.startDiscard(now, i)
	}
}

// keepFrom has expireFrozen look again when what froze at a time has been kept long enough. Guarded by mu.
func (m *Manager) keepFrom(frozen time.Time) {
	if end := frozen.Add(m.config.FrozenTTL); m.frozenEnd.IsZero() || end.Before(m.frozenEnd) {
		m.frozenEnd = end
	}
}

// expireFrozen gives up what nobody has asked for in a long time.
func (m *Manager) expireFrozen(now time.Time) {
	if !m.frozenEnd.IsZero() && !now.Before(m.frozenEnd) {
		m.frozenEnd = time.Time{}
		for i := range m.index.frozen {
			switch {
			case !i.asleep():
				m.keepFrom(now)
			case now.Sub(i.frozen) >= m.config.FrozenTTL:
				m.startDiscard(now, i)
			default:
				m.keepFrom(i.frozen)
			}
		}
	}
	if !m.frozenEnd.IsZero() {
		m.at(m.frozenEnd)
	}
}
