package pool

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	reconnectFirst = 50 * time.Millisecond
	reconnectMost  = 500 * time.Millisecond
	// toldAfter is after how many attempts in a row it is said that there is nobody.
	toldAfter = 4
	// outcomeSlack is how long after a claim's deadline the node has to end it.
	outcomeSlack = 3 * time.Second
	// refusedTime is how long an Instance that was refused although it looked Warm is left alone before it is discarded.
	refusedTime = 10 * time.Second
)

// watch follows one node until ctx is done.
func (m *Manager) watch(ctx context.Context, n *node) {
	for failures := 0; ctx.Err() == nil; {
		session := m.connected(n)
		err := n.client.Watch(ctx, m.epoch, func(e *hearthv1.WatchInstancesResponse) error {
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
		if failures++; failures == toldAfter && ctx.Err() == nil {
			m.log.Warn("node cannot be reached; it is tried again", "node", n.name, "err", err)
		}
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
		if n.removed {
			return
		}
		if n.synced || n.since.IsZero() {
			m.log.Warn("node lost", "node", n.name, "err", err)
			n.since = now
		}
		m.setSynced(n, false)
		n.heard, m.listen = true, true
		if n.silent = unanswered(err); n.silent {
			n.cut() // nobody will answer; claims go elsewhere
		}
		m.tellReady()
	})
}

// event takes in one message, and says whether it was the mark.
func (m *Manager) event(n *node, session int, e *hearthv1.WatchInstancesResponse) (synced bool) {
	m.fact(func(now time.Time) {
		if n.removed {
			return
		}
		if n.silent {
			n.silent, m.listen = false, true
		}
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
	for i := range maps.Clone(m.index.nodes[n.name]) {
		if i.session < session && !i.making && i.by == nil && !i.freezing {
			m.remove(now, i)
		}
	}
	m.setSynced(n, true)
	n.heard, n.since = true, time.Time{}
	clear(n.supplies)
	m.unsettle(n)
	m.tellReady()
	m.log.Info("node connected", "node", n.name)
	for _, r := range m.runtimes {
		if r.current != nil {
			m.prepareRuntime(n, r)
		}
	}
	if m.config.PrepareNodes > 0 {
		for name, p := range n.prepares { // it may have less than it had
			if p.run == nil && !m.isRuntimeImage(name) {
				m.dropPrepared(n, name)
			}
		}
		m.resettle(now)
		return
	}
	for _, f := range m.functions {
		if !f.deleting {
			m.prepareFunction(n, f)
		}
	}
}

// observe takes in what a node says of an Instance. An older word than what is known changes nothing.
func (m *Manager) observe(now time.Time, n *node, session int, said *hearthv1.Instance) {
	i := m.meant(now, n, session, said)
	if i == nil {
		return
	}
	defer m.place(i)
	fresh := i.session < session
	i.session = max(i.session, session)
	if said.GetState() == hearthv1.State_STATE_GONE {
		m.remove(now, i)
		return
	}
	switch age := i.compare(said); {
	case age == older:
		// The opening list may have been made before an answer that has come already.
	case age == backward:
		m.disowned(now, i, said, fresh)
	default:
		if fresh && i.by == nil || age == newer {
			i.refused, i.limbo = false, false
		}
		m.merge(now, i, said)
	}
}

// meant is the Instance that a node speaks of, a new one if need be; nil if there is none.
func (m *Manager) meant(now time.Time, n *node, session int, said *hearthv1.Instance) *instance {
	i := m.instances[said.GetId()]
	if i != nil && i.state == hearthv1.State_STATE_GONE && i.session < session && i.node == n.name {
		// It said that it had discarded it, and now lists it.
		m.drop(i)
		i = nil
	}
	switch {
	case i == nil && (said.GetState() == hearthv1.State_STATE_GONE || said.GetId() == ""):
	case i == nil:
		i = &instance{id: said.GetId(), node: n.name, away: n.away, gone: make(chan struct{}), created: now}
		m.add(i)
	case i.node != n.name:
		m.log.Error("two nodes have an instance of one name; the second is ignored", "instance", i.id, "node", i.node, "second", n.name)
		return nil
	}
	return i
}

// age is how what a node says relates to what is known.
type age int

const (
	older age = iota
	same
	newer
	// backward is what no Instance does: to be generic again, or less than it was on a node that has no versions.
	backward
)

// compare says how old a node's word is. Versions decide; states come again (Serving and Frozen). A node that counts no versions is
// an old one, which does not freeze: there a lower state is an older word, or that of a node that has restarted.
func (i *instance) compare(said *hearthv1.Instance) age {
	if i.version == 0 || said.GetVersion() == 0 {
		return [...]age{backward, same, newer}[1+cmp.Compare(said.GetState(), i.state)]
	}
	switch {
	case said.GetVersion() < i.version:
		return older
	case said.GetVersion() == i.version:
		return same
	case said.GetState() <= hearthv1.State_STATE_WARM && i.state > hearthv1.State_STATE_WARM:
		return backward
	}
	return newer
}

// disowned handles an Instance that its node says less of than was known: it has restarted and does not know of a claim, which so
// comes to nothing; or the word is an old one. Whatever once held a Revision is never generic again.
func (m *Manager) disowned(now time.Time, i *instance, said *hearthv1.Instance, fresh bool) {
	counted := i.version != 0 && said.GetVersion() != 0
	if !fresh && !counted {
		return
	}
	if i.state == hearthv1.State_STATE_CLAIMED {
		i.until = now
		if a := m.waiter(i); a != nil {
			a.next = now
		}
		return
	}
	if counted {
		m.log.Error("a node says that an instance is generic again; discard it", "instance", i.id, "node", i.node, "was", i.state, "is", said.GetState())
		m.startDiscard(now, i)
	}
}

func (m *Manager) merge(now time.Time, i *instance, said *hearthv1.Instance) {
	before, waits := i.state, m.waiter(i)
	if said.GetFunction() != i.function {
		m.touch(i) // a node that was restarted may not know whose it was: gateways have to hear that it is not there any more
	}
	i.state, i.degree, i.address = said.GetState(), said.GetDegree(), said.GetAddress()
	i.claim, i.function, i.revision = said.GetClaim(), said.GetFunction(), said.GetRevision()
	if i.memory = said.GetMemoryBytes(); !i.making || i.state >= hearthv1.State_STATE_WARM { // until then it is what we asked for
		i.kind = kind{runtime: said.GetRuntime(), generation: said.GetRuntimeGeneration()}
		if r := m.runtimes[said.GetRuntime()]; r != nil && r.generation == said.GetRuntimeGeneration() && said.GetLanguage() != "" {
			r.language = said.GetLanguage()
		}
		i.pod, i.group = said.GetPod(), group{}
		if said.GetGroup() != "" {
			i.group = group{said.GetTenant(), said.GetGroup()}
			i.kind.group, i.kind.pod = i.group, i.podID()
		}
	}
	i.version = max(i.version, said.GetVersion())
	if said.GetCreatedAt() != nil {
		i.created = said.GetCreatedAt().AsTime()
	}
	if before == i.state {
		return
	}
	m.tell(i)
	switch i.state {
	case hearthv1.State_STATE_WARM:
		m.tellStocked()
	case hearthv1.State_STATE_CLAIMED:
		i.until = i.claim.GetDeadline().AsTime().Add(outcomeSlack)
		if a := m.waiter(i); a != nil {
			a.next = a.deadline // it took effect: the outcome comes this way
		}
	case hearthv1.State_STATE_SERVING:
		i.serving = now
		m.served(now, i)
	case hearthv1.State_STATE_FROZEN:
		if waits != nil {
			waits.next = now // nothing came of its claim
		}
		m.slept(now, i)
	}
	m.touch(i)
	if f := m.functions[i.function]; f != nil && before >= hearthv1.State_STATE_SERVING {
		m.changed[f] = struct{}{} // gateways knew it
	}
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
	m.place(i)
	if a := m.waiter(i); a != nil {
		m.succeed(now, a, i, nil)
	}
}

// waiter is the allocation in the queue that an Instance is for: its last claim is on it, and its answer was lost; or it has made none,
// and an earlier term has, of which its node tells only now.
func (m *Manager) waiter(i *instance) *allocation {
	for _, a := range m.queue {
		if a.claim != nil && a.claim.GetId() == i.claim.GetId() || a.claim == nil && a.id == allocationOf(i.claim) {
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
	m.drop(i)
	if i.state == hearthv1.State_STATE_GONE {
		return
	}
	if a := m.waiter(i); a != nil {
		a.next = now // nothing comes of that one
	}
	m.touch(i)
	i.state = hearthv1.State_STATE_GONE
	close(i.gone)
	m.tell(i)
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
		for i := range maps.Clone(m.index.nodes[n.name]) {
			// What the stream of now has named is there, even if it has not told everything yet.
			if i.session < n.session && i.by == nil && !i.making && !i.freezing {
				m.remove(now, i)
			}
		}
	}
}

// expireInstances ends what should have come to an end by itself.
func (m *Manager) expireInstances(now time.Time) {
	for i := range m.index.restless {
		if i.by != nil || i.discard != nil || i.state == hearthv1.State_STATE_GONE {
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

// tell says outside that an Instance changed.
func (m *Manager) tell(i *instance) {
	if m.config.Changed != nil {
		m.config.Changed(i.id)
	}
}

// touch asks for an Endpoints event because of an Instance, if gateways know or should know it.
func (m *Manager) touch(i *instance) {
	if f := m.functions[i.function]; f != nil && i.state >= hearthv1.State_STATE_SERVING {
		m.changed[f] = struct{}{}
	}
}
