package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"slices"
	"syscall"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// zoneLabel is where Kubernetes says what fails together.
const zoneLabel = "topology.kubernetes.io/zone"

const (
	// gatherTime bounds how long a new term waits to hear from the nodes that it began with. Before that, what is there already would
	// be taken for what is missing.
	gatherTime = 2 * time.Second
	// resettle is how long after a change of the nodes Functions are prepared anew where they belong then.
	resettle = 200 * time.Millisecond
	// imageRetry is after when an image is asked for again that a node could not have.
	imageRetry = 30 * time.Second
)

// NodeInfo is what there is to know of a node besides its Instances.
type NodeInfo struct {
	Labels map[string]string
	// Cordoned: nothing is made or claimed there any more, and what is warm is given up. What serves goes on.
	Cordoned bool
	// Unready: nothing is made there for now. Nodeagent's own word decides about all else.
	Unready bool
}

// Instance tells of one, or returns nil if there is none of that id.
func (m *Manager) Instance(id string) *hearthv1.Instance {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := m.instances[id]
	if i == nil || i.state == hearthv1.State_STATE_GONE {
		return nil
	}
	return i.shown()
}

// InPod lists the Instances that are in a pod: the one that it was made for, and a group's others.
func (m *Manager) InPod(pod string) (all []*hearthv1.Instance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i := m.instances[pod]; i != nil && i.state != hearthv1.State_STATE_GONE {
		all = append(all, i.shown())
	}
	for _, set := range m.index.groups {
		for i := range set {
			if i.podID() == pod && i.id != pod {
				all = append(all, i.shown())
			}
		}
	}
	return all
}

// NodeUp says whether a node is connected and has told of all its Instances.
func (m *Manager) NodeUp(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.nodes[name]
	return n != nil && n.synced
}

// SupplyErrors says on which nodes no warm Instance of a Runtime, or no sandbox for the empty name, could be made, and why.
func (m *Manager) SupplyErrors(runtime string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.supplyErrors(runtime)
}

// WarmSet is a number of warm Instances that each node which it covers keeps, beside Config.PoolSize and what Runtimes ask for
// themselves. The numbers of several sets add up.
type WarmSet struct {
	// Runtime is booted in them; empty is a sandbox.
	Runtime string
	PerNode int
	// Images that these nodes have ahead: of Functions, or packages of code.
	Images []string
	// Covers says whether a node is meant; nil is every node. It must not block.
	Covers func(name string, info NodeInfo) bool
}

var errNodeGone = errors.New("the node was removed")

// newNode makes a node that is not connected yet.
func (m *Manager) newNode(now time.Time, name string, client Node, info NodeInfo) *node {
	n := &node{name: name, hash: hashOf(name), client: client, info: info, since: now, supplies: map[string]*supply{}, prepares: map[string]*prepare{},
		calls: map[*context.CancelFunc]struct{}{}}
	m.nodes[name] = n
	m.measure(n)
	m.do(func(ctx context.Context) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		m.mu.Lock()
		n.stop = cancel
		removed := n.removed
		m.mu.Unlock()
		if !removed {
			m.watch(ctx, n)
		}
	})
	return n
}

// AddNode has the Manager work on one more node. A name that is there already is an error: what is known of its Instances is of the
// other client.
func (m *Manager) AddNode(name string, client Node, info NodeInfo) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.nodes[name] != nil {
		return fmt.Errorf("add node %s: there is one of that name", name)
	}
	m.newNode(time.Now(), name, client, info)
	return nil
}

// UpdateNode takes in that a node was changed. An unknown one is none of the Manager's.
func (m *Manager) UpdateNode(name string, info NodeInfo) {
	m.fact(func(now time.Time) {
		n := m.nodes[name]
		if n == nil {
			return
		}
		if n.info.Cordoned != info.Cordoned {
			m.log.Info("node changed", "node", name, "cordoned", info.Cordoned)
		}
		n.info = info
		m.measure(n)
		m.resettle(now)
	})
}

// RemoveNode takes in that a node is no more. Its Instances are gone, and calls to it that are under way are given up, so that claims
// go elsewhere.
func (m *Manager) RemoveNode(name string) {
	m.fact(func(now time.Time) {
		n := m.nodes[name]
		if n == nil {
			return
		}
		m.log.Info("node removed", "node", name)
		delete(m.nodes, name)
		m.setSynced(n, false)
		n.removed, n.heard, m.listen = true, true, true
		if n.stop != nil {
			n.stop()
		}
		n.cut()
		for name, p := range n.prepares {
			m.hold(n, name, false)
			if p.run != nil && !p.started {
				p.err, p.run = errNodeGone, nil
				close(p.done)
			}
		}
		for i := range maps.Clone(m.index.nodes[name]) {
			m.remove(now, i)
		}
		m.tellReady()
		m.resettle(now)
	})
}

// SetWarmSets replaces all sets of before.
func (m *Manager) SetWarmSets(sets []WarmSet) {
	sets = slices.Clone(sets)
	m.fact(func(now time.Time) {
		m.warmSets = sets
		for _, n := range m.nodes {
			m.measure(n)
		}
		m.resettle(now)
	})
}

// measure takes in what a node is, and sums up what the sets ask of it.
func (m *Manager) measure(n *node) {
	n.zone = "zone/" + n.info.Labels[zoneLabel]
	m.unsettle(n)
	n.sizes, n.images = map[string]int{}, nil
	for _, s := range m.warmSets {
		if s.Covers == nil || s.Covers(n.name, n.info) {
			n.sizes[s.Runtime] += max(0, s.PerNode)
			n.images = append(n.images, s.Images...)
		}
	}
}

// prepareImage has an image on a node that no Function may have yet. It stands for itself as a Revision, whose name can be no Function's:
// theirs end in five digits or more.
func (m *Manager) prepareImage(n *node, ref string) {
	name := fmt.Sprintf("image-%016x-i", hashOf(ref))
	if n.prepares[name] != nil {
		return
	}
	m.prepareOn(n, &prepare{
		revision: &hearthv1.Revision{Name: name, Function: "image", Image: ref, Port: defaultPort},
		pin:      func(string) error { return nil },
		then: func(now time.Time, err error) {
			if err != nil { // it is tried again, with all else that is missing then
				m.dropPrepared(n, name)
				if next := now.Add(imageRetry); m.settleAt.IsZero() || m.settleAt.After(next) {
					m.settleAt = next
					m.at(next)
				}
			}
		},
	})
}

// size is how many warm Instances of a kind a node keeps.
func (m *Manager) size(n *node, runtime string) int {
	if n.info.Cordoned {
		return 0
	}
	size := n.sizes[runtime]
	if runtime == "" {
		return size + m.config.PoolSize
	}
	if r := m.runtimes[runtime]; r != nil {
		size += int(r.current.GetWarm())
	}
	return size
}

// call has something asked of a node. ctx ends early if the node is removed, or falls silent. Guarded by mu.
func (m *Manager) call(n *node, ask func(ctx context.Context)) {
	m.do(func(ctx context.Context) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		m.mu.Lock()
		if n.removed || n.silent {
			cancel()
		}
		n.calls[&cancel] = struct{}{}
		m.mu.Unlock()
		defer func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			delete(n.calls, &cancel)
		}()
		ask(ctx)
	})
}

// cut gives up the calls that are under way.
func (n *node) cut() {
	for cancel := range n.calls {
		(*cancel)()
	}
}

// unanswered says of the end of a stream that nothing at all came from the node: not a refusal either, which would say that the node
// is there and its nodeagent is not, as in every upgrade.
func unanswered(err error) bool {
	if n, ok := errors.AsType[net.Error](err); ok && n.Timeout() {
		return true
	}
	for _, e := range []error{context.DeadlineExceeded, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ETIMEDOUT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return connect.CodeOf(err) == connect.CodeDeadlineExceeded
}

// hush takes in whether a node says nothing, and keeps traffic from the Instances of those that do. They are not forgotten: should the
// node be back before NodeTimeout, so are they.
func (m *Manager) hush() {
	if !m.listen {
		return
	}
	m.listen = false
	silent := 0
	for _, n := range m.nodes {
		if n.silent {
			silent++
		}
	}
	// When most are silent it is this poolmanager that is cut off, and no reason to take away what gateways can reach.
	believed := silent <= m.up
	for _, n := range m.nodes {
		away := n.silent && believed
		if n.away == away {
			continue
		}
		n.away = away
		m.log.Warn("node silent", "node", n.name, "withdrawn", away)
		for i := range m.index.nodes[n.name] {
			if i.away == away {
				continue
			}
			i.away = away
			m.place(i)
			m.touch(i)
		}
	}
}

// gather ends the first wait of a term once every node has been heard of.
func (m *Manager) gather(now time.Time) {
	if m.gathered || now.Before(m.gatherEnd) && slices.ContainsFunc(slices.Collect(maps.Values(m.nodes)), func(n *node) bool { return !n.heard }) {
		if !m.gathered {
			m.at(m.gatherEnd)
		}
		return
	}
	m.gathered = true
	close(m.open)
}

// awaitGathered returns when this term knows what there is.
func (m *Manager) awaitGathered(ctx context.Context) error {
	select {
	case <-m.open:
		return nil
	case <-ctx.Done():
		return connect.NewError(codeOf(ctx), ctx.Err())
	}
}

// homes are the nodes that are there on which a Function is prepared: those with warm Instances for it, and no more than
// Config.PrepareNodes. Which ones follows from the names alone (rendezvous hashing), so that a node that comes or goes moves few.
func (m *Manager) homes(f *function) []*node {
	var all, covered []*node
	runtime := f.spec.GetRuntime()
	for _, n := range m.nodes {
		if !n.synced || n.info.Cordoned {
			continue
		}
		all = append(all, n)
		if m.size(n, runtime) > 0 {
			covered = append(covered, n)
		}
	}
	if len(covered) > 0 && len(m.warmSets) > 0 {
		all = covered
	}
	if limit := m.config.PrepareNodes; limit > 0 && limit < len(all) {
		own := hashOf(f.name)
		slices.SortFunc(all, func(a, b *node) int { return cmp.Compare(mix(own^a.hash), mix(own^b.hash)) })
		all = all[:limit]
	}
	return all
}

func hashOf(name string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(name)) // never fails
	return h.Sum64()
}

// mix is the last step of SplitMix64: every bit of what comes out depends on every bit of what went in.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// resettle has Functions prepared where they belong now, in a moment: nodes come in numbers.
func (m *Manager) resettle(now time.Time) {
	if soon := now.Add(resettle); m.settleAt.IsZero() || m.settleAt.After(soon) {
		m.settleAt = soon
	}
}

// prepareAll has every Function prepared on its homes, if that is due.
func (m *Manager) prepareAll(now time.Time) {
	if m.settleAt.IsZero() {
		return
	}
	if now.Before(m.settleAt) {
		m.at(m.settleAt)
		return
	}
	m.settleAt = time.Time{}
	for _, f := range m.functions {
		if f.deleting {
			continue
		}
		for _, n := range m.homes(f) {
			if n.prepares[f.revision.GetName()] == nil {
				m.prepareFunction(n, f)
			}
		}
	}
	for _, n := range m.nodes {
		if !n.synced || n.info.Cordoned {
			continue
		}
		for _, ref := range n.images {
			m.prepareImage(n, ref)
		}
	}
}
