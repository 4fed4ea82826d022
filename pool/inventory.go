package pool

import (
	"context"
	"errors"
	"fmt"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	reconnectFirst = 50 * time.Millisecond
	reconnectMost  = 500 * time.Millisecond
	// makeTime bounds a sandbox's creation.
	makeTime = time.Minute
	// outcomeSlack is how long after a claim's deadline the node has to end it.
	outcomeSlack = 3 * time.Second
	// refusedTime is how long an Instance that was refused although it looked Warm is left alone before it is discarded.
	refusedTime = 10 * time.Second
)

// watch follows one node until ctx is done.
func (m *Manager) watch(ctx context.Context, n *node) {
	for failures := 0; ctx.Err() == nil; {
		session := m.connected(n)
		err := n.client.Watch(ctx, func(e *hearthv1.WatchInstancesResponse) error {
			if e.GetEpoch() > m.epoch {
				m.stale(ctx, n.name, e.GetEpoch())
				return ErrStale
			}
			if m.event(n, session, e) {
				failures = 0
			}
			return nil
		})
		m.lost(n, err)
		if errors.Is(err, ErrStale) {
			return
		}
		failures++
		pause := time.NewTimer(backoff(failures, reconnectFirst, reconnectMost))
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
		}
	}
}

func (m *Manager) connected(n *node) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n.session++
	return n.session
}

func (m *Manager) lost(n *node, err error) {
	m.fact(func(now time.Time) {
		if n.synced || n.since.IsZero() {
			m.log.Warn("node lost", "node", n.name, "err", err)
			n.since = now
		}
		n.synced = false
		m.tellReady()
	})
}

// event takes in one message, and says whether it was the mark.
func (m *Manager) event(n *node, session int, e *hearthv1.WatchInstancesResponse) (synced bool) {
	m.fact(func(now time.Time) {
		if i := e.GetInstance(); i != nil {
			m.observe(now, n, session, i)
		}
		if synced = e.GetSynced(); synced {
			m.sync(now, n, session)
		}
	})
	return synced
}

// sync closes a node's opening list: what it left out is gone.
func (m *Manager) sync(now time.Time, n *node, session int) {
	for _, i := range m.instances {
		if i.node == n.name && i.session < session && !i.making && i.by == nil {
			m.remove(now, i)
		}
	}
	n.synced, n.since = true, time.Time{}
	n.failures, n.retry = 0, time.Time{}
	m.tellReady()
	m.log.Info("node connected", "node", n.name)
	for _, f := range m.functions {
		if !f.deleting {
			m.prepareOn(n, f)
		}
	}
}

// observe takes in what a node says of an Instance. States never go back, so an older word than what is known changes nothing.
func (m *Manager) observe(now time.Time, n *node, session int, said *hearthv1.Instance) {
	i := m.instances[said.GetId()]
	if i != nil && i.state == hearthv1.State_STATE_GONE && i.session < session && i.node == n.name {
		// It said that it had discarded it, and now lists it.
		delete(m.instances, i.id)
		i = nil
	}
	if i == nil {
		if said.GetState() == hearthv1.State_STATE_GONE || said.GetId() == "" {
			return
		}
		i = &instance{id: said.GetId(), node: n.name, gone: make(chan struct{}), created: now}
		m.instances[i.id] = i
	}
	if i.node != n.name {
		m.log.Error("two nodes have an instance of one name; the second is ignored", "instance", i.id, "node", i.node, "second", n.name)
		return
	}
	fresh := i.session < session
	i.session = max(i.session, session)
	if said.GetState() == hearthv1.State_STATE_GONE {
		m.remove(now, i)
		return
	}
	if fresh && i.by == nil || said.GetState() > hearthv1.State_STATE_WARM {
		i.refused, i.limbo = false, false
	}
	if said.GetState() < i.state {
		if fresh && i.state == hearthv1.State_STATE_CLAIMED {
			i.until = now // the node has restarted and knows nothing of the claim: it comes to nothing
			if a := m.waiter(i); a != nil {
				a.next = now
			}
		}
		return
	}
	m.merge(now, i, said)
}

func (m *Manager) merge(now time.Time, i *instance, said *hearthv1.Instance) {
	before := i.state
	i.state, i.degree, i.address = said.GetState(), said.GetDegree(), said.GetAddress()
	i.claim, i.function, i.revision = said.GetClaim(), said.GetFunction(), said.GetRevision()
	if said.GetCreatedAt() != nil {
		i.created = said.GetCreatedAt().AsTime()
	}
	if before == i.state {
		return
	}
	switch i.state {
	case hearthv1.State_STATE_WARM:
		i.warm = now
	case hearthv1.State_STATE_CLAIMED:
		i.until = i.claim.GetDeadline().AsTime().Add(outcomeSlack)
		if a := m.waiter(i); a != nil {
			a.next = a.deadline // it took effect: the outcome comes this way
		}
	case hearthv1.State_STATE_SERVING:
		i.serving = now
		m.served(now, i)
	}
	m.touch(i)
}

// served handles an Instance that began to serve: it may be the answer to an allocation whose call was lost, or nobody's.
func (m *Manager) served(now time.Time, i *instance) {
	f := m.functions[i.function]
	if f == nil || f.deleting {
		m.log.Info("discard an instance of an unknown function", "instance", i.id, "function", i.function)
		m.startDiscard(now, i)
		return
	}
	if i.by != nil {
		return // the call's own answer follows, with its phases
	}
	if a := m.waiter(i); a != nil {
		m.succeed(now, a, i, nil)
	}
}

// waiter is the allocation in the queue whose last claim is on an Instance: its answer was lost.
func (m *Manager) waiter(i *instance) *allocation {
	for _, a := range m.queue {
		if a.claim != nil && a.claim.GetId() == i.claim.GetId() {
			return a
		}
	}
	return nil
}

// remove forgets an Instance that does not exist any more.
func (m *Manager) remove(now time.Time, i *instance) {
	if i.routable() {
		m.log.Warn("an instance is gone that nobody gave up", "instance", i.id, "function", i.function, "node", i.node)
	}
	delete(m.instances, i.id)
	if i.state == hearthv1.State_STATE_GONE {
		return
	}
	if a := m.waiter(i); a != nil {
		a.next = now // nothing comes of that one
	}
	m.touch(i)
	i.state = hearthv1.State_STATE_GONE
	close(i.gone)
}

// expireNodes gives up the Instances of nodes that have been away for too long.
func (m *Manager) expireNodes(now time.Time) {
	for _, n := range m.nodes {
		if n.synced || n.since.IsZero() {
			continue
		}
		if end := n.since.Add(m.config.NodeTimeout); now.Before(end) {
			m.at(end)
			continue
		}
		for _, i := range m.instances {
			// What the stream of now has named is there, even if it has not told everything yet.
			if i.node == n.name && i.session < n.session && i.by == nil && !i.making {
				m.remove(now, i)
			}
		}
	}
}

// expireInstances ends what should have come to an end by itself.
func (m *Manager) expireInstances(now time.Time) {
	for _, i := range m.instances {
		if i.by != nil || i.discard != nil {
			continue
		}
		if i.state == hearthv1.State_STATE_CLAIMED || i.refused || i.limbo {
			if now.Before(i.until) {
				m.at(i.until)
				continue
			}
			m.log.Warn("discard an instance whose claim came to nothing", "instance", i.id, "claim", i.claim.GetId())
			m.startDiscard(now, i)
		}
	}
}

// touch asks for an Endpoints event because of an Instance, if gateways know or should know it.
func (m *Manager) touch(i *instance) {
	if f := m.functions[i.function]; f != nil && i.state >= hearthv1.State_STATE_SERVING {
		f.dirty = true
	}
}

// refillNodes begins and ends warm Instances.
func (m *Manager) refillNodes(now time.Time) {
	waiting := len(m.eligible(now))
	stocks, loads := map[string]stock{}, map[string]int{}
	for _, n := range m.nodes {
		if !n.synced {
			continue
		}
		s := m.stock(n)
		stocks[n.name], loads[n.name] = s, s.making
		waiting -= s.making + m.refusedOn(n)
	}
	shares := spread(max(0, waiting), loads)
	for name, s := range stocks {
		demand := shares[name]
		if demand > 0 {
			demand += s.making
		}
		plan := refill(now, m.config.PoolSize, demand, s)
		if !plan.again.IsZero() {
			m.at(plan.again)
		}
		for range plan.make {
			m.makeWarm(now, m.nodes[name])
		}
		m.giveUp(now, name, plan.surplus)
	}
}

func (m *Manager) stock(n *node) stock {
	s := stock{began: n.began, ended: n.ended, retry: n.retry}
	for _, i := range m.instances {
		if i.node != n.name {
			continue
		}
		switch {
		case i.by != nil:
			s.activating++
		case i.discard != nil:
		case i.making || i.state == hearthv1.State_STATE_CREATING:
			s.making++
		case i.state == hearthv1.State_STATE_WARM:
			s.warm++
		}
	}
	return s
}

func (m *Manager) refusedOn(n *node) int {
	count := 0
	for _, i := range m.instances {
		if i.node == n.name && i.spare() && i.refused {
			count++
		}
	}
	return count
}

func (m *Manager) makeWarm(now time.Time, n *node) {
	i := &instance{id: newID("i-"), node: n.name, making: true, gone: make(chan struct{}), created: now,
		degree: hearthv1.Degree_DEGREE_SANDBOX}
	m.instances[i.id] = i
	m.do(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, makeTime)
		defer cancel()
		said, err := n.client.CreateInstance(ctx, &hearthv1.CreateInstanceRequest{Id: i.id, Degree: i.degree})
		if err == nil && said.GetId() != i.id {
			err = fmt.Errorf("node %s made instance %q and not %q", n.name, said.GetId(), i.id)
		}
		m.fact(func(now time.Time) { m.made(now, n, i, said, err) })
	})
}

// made takes in the outcome of a creation. When it is unknown the node's stream will tell.
func (m *Manager) made(now time.Time, n *node, i *instance, said *hearthv1.Instance, err error) {
	i.making = false
	if err == nil {
		n.failures, n.lastErr = 0, ""
		m.metrics.made.WithLabelValues("ok").Inc()
		if i.state < said.GetState() && i.state != hearthv1.State_STATE_GONE {
			m.observe(now, n, i.session, said)
		}
		return
	}
	m.metrics.made.WithLabelValues("error").Inc()
	n.failures++
	n.lastErr = message(err)
	n.retry = now.Add(backoff(n.failures, 200*time.Millisecond, 5*time.Second))
	if n.synced {
		m.log.Warn("make a warm instance", "node", n.name, "instance", i.id, "failures", n.failures, "err", err)
	}
	switch {
	case i.state == hearthv1.State_STATE_GONE:
	case i.session == 0:
		m.remove(now, i)
	case i.state < hearthv1.State_STATE_WARM:
		m.startDiscard(now, i)
	}
}

func (m *Manager) giveUp(now time.Time, nodeName string, n int) {
	for _, i := range m.instances {
		if n > 0 && i.node == nodeName && i.spare() && !i.refused {
			m.startDiscard(now, i)
			n--
		}
	}
}
