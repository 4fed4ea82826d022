package pool

import (
	"context"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// subscriberGone is how long a gateway counts in drains after its stream ended: it may be back with another.
	subscriberGone = 5 * time.Second
	discardTime    = time.Minute
	discardFirst   = 200 * time.Millisecond
	discardMost    = 10 * time.Second
	defaultTimeout = 60 * time.Second
)

// release begins the orderly end of an Instance's traffic: drained if it serves, discarded if it does not. What is to be discarded
// is, even if it was to be frozen before.
func (m *Manager) release(now time.Time, i *instance, end end) {
	if i.leaving() {
		if i.drain != nil && end == toDiscard {
			i.drain.end = toDiscard
		}
		return
	}
	defer m.place(i)
	if i.state != hearthv1.State_STATE_SERVING {
		m.startDiscard(now, i)
		return
	}
	timeout := m.config.DrainTimeout + defaultTimeout
	if f := m.functions[i.function]; f.timeout() > 0 {
		timeout = m.config.DrainTimeout + f.timeout()
	}
	i.drain = &drain{began: now, deadline: now.Add(timeout), end: end}
	m.touch(i)
	m.log.Info("drain", "instance", i.id, "function", i.function)
}

func (f *function) timeout() time.Duration {
	if f == nil {
		return 0
	}
	return f.spec.GetTimeout().AsDuration()
}

// acknowledgement is what one gateway says.
type acknowledgement struct {
	version  int64
	inFlight int32 // on the Instance in question
}

// drained says whether an Instance may be discarded: every gateway knows, and none has a request there.
func drained(d drain, gateways []acknowledgement) bool {
	for _, g := range gateways {
		if g.version < d.version || g.inFlight > 0 {
			return false
		}
	}
	return d.version > 0
}

// endDrains freezes or discards what is drained, and discards what has had its time.
func (m *Manager) endDrains(now time.Time) {
	for i := range m.index.restless {
		if i.drain == nil || i.discard != nil || i.freezing {
			continue
		}
		gateways := make([]acknowledgement, 0, len(m.subscribers))
		for _, s := range m.subscribers {
			gateways = append(gateways, acknowledgement{s.version, s.inFlight[i.id]})
		}
		end := i.drain.end
		switch {
		case drained(*i.drain, gateways):
			m.metrics.drains.WithLabelValues("drained").Inc()
		case now.Before(i.drain.deadline):
			m.at(i.drain.deadline)
			continue
		default:
			m.metrics.drains.WithLabelValues("timeout").Inc()
			m.log.Warn("drain took too long; discard with requests in flight", "instance", i.id, "function", i.function)
			end = toDiscard
		}
		m.metrics.drainTime.Observe(now.Sub(i.drain.began).Seconds())
		if end == toFreeze && m.mayFreeze(m.functions[i.function], i) {
			m.freeze(i)
			continue
		}
		m.startDiscard(now, i)
	}
}

// startDiscard decides that an Instance ends now.
func (m *Manager) startDiscard(now time.Time, i *instance) {
	if i.discard != nil || i.state == hearthv1.State_STATE_GONE {
		return
	}
	i.discard = &discard{next: now}
	m.touch(i)
	m.place(i)
}

// discardNext has the nodes carry out what was decided.
func (m *Manager) discardNext(now time.Time) {
	for i := range m.index.restless {
		d := i.discard
		if d == nil || d.calling || d.done || i.making || i.freezing {
			continue
		}
		n := m.nodes[i.node]
		if !n.synced {
			continue // its next opening list brings us here again
		}
		if now.Before(d.next) {
			m.at(d.next)
			continue
		}
		d.calling = true
		d.attempts++
		m.call(n, func(ctx context.Context) {
			ctx, cancel := context.WithTimeout(ctx, discardTime)
			defer cancel()
			err := n.client.Discard(ctx, &hearthv1.DiscardRequest{InstanceId: i.id, Epoch: m.epoch})
			m.fact(func(now time.Time) { m.discarded(now, n, i, err) })
		})
	}
}

func (m *Manager) discarded(now time.Time, n *node, i *instance, err error) {
	d := i.discard
	d.calling = false
	if err != nil {
		m.metrics.discards.WithLabelValues("error").Inc()
		d.next = now.Add(backoff(d.attempts, discardFirst, discardMost))
		if n.synced {
			m.log.Warn("discard", "instance", i.id, "attempts", d.attempts, "err", err)
		}
		return
	}
	m.metrics.discards.WithLabelValues("ok").Inc()
	d.done = true
	// What the stream still has to say of it is older than this; the record stays to know that, until the stream agrees or
	// begins anew. Those who wait need not.
	if i.state != hearthv1.State_STATE_GONE {
		m.remove(now, i)
		i.refused, i.limbo = false, false
		m.add(i)
	}
}
