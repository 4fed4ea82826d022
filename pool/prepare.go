package pool

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// prepareTime bounds the pull of one image on one node.
	prepareTime = 15 * time.Minute
	// prepareParallel images are pulled at once on one node, before anyone asks for them.
	prepareParallel = 2
	forgetTime      = time.Minute
)

// prepare is what one Revision needs on its way to one node. Guarded by Manager.mu, but for done.
type prepare struct {
	revision  *hearthv1.Revision
	snapshots int
	// pin fixes the image that the node resolved. then takes in the outcome.
	pin  func(image string) error
	then func(now time.Time, err error)

	done    chan struct{}
	started bool
	err     error
	run     func(context.Context)
}

func (n *node) has(revision string) bool {
	p := n.prepares[revision]
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return p.err == nil
	default:
		return false
	}
}

// dropPrepared forgets what was prepared on a node.
func (m *Manager) dropPrepared(n *node, revision string) {
	delete(n.prepares, revision)
	m.hold(n, revision, false)
}

// hold notes which nodes have a Revision.
func (m *Manager) hold(n *node, revision string, has bool) {
	holders := m.holders[revision]
	if !has {
		if delete(holders, n); len(holders) == 0 {
			delete(m.holders, revision)
		}
		return
	}
	if holders == nil {
		holders = map[*node]struct{}{}
		m.holders[revision] = holders
	}
	holders[n] = struct{}{}
}

// prepareFunction has a Function's present Revision prepared on a node: its image, or its code with its Runtime.
func (m *Manager) prepareFunction(n *node, f *function) *prepare {
	revision := m.complete(f)
	return m.prepareOn(n, &prepare{
		revision: revision, snapshots: m.config.Snapshots,
		pin: func(image string) error { return m.pin(f.name, revision.GetName(), image) },
		then: func(_ time.Time, _ error) {
			// Its Runtime was changed meanwhile.
			if m.functions[f.name] == f && m.complete(f).GetRuntime().GetGeneration() != revision.GetRuntime().GetGeneration() &&
				f.revision.GetName() == revision.GetName() {
				m.prepareFunction(n, f)
			}
		},
	})
}

// prepareOn has something prepared on a node, or joins that. One that is done is done again: after a restart the node may have less
// than it had, and what it has costs it nothing.
func (m *Manager) prepareOn(n *node, p *prepare) *prepare {
	name := p.revision.GetName()
	if p := n.prepares[name]; p != nil {
		select {
		case <-p.done:
		default:
			return p
		}
	}
	p.done = make(chan struct{})
	if n.removed {
		p.err = errNodeGone
		close(p.done)
		return p
	}
	p.run = func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, prepareTime)
		defer cancel()
		res, err := n.client.PrepareRevision(ctx, &hearthv1.PrepareRevisionRequest{Revision: p.revision, Snapshots: int32(p.snapshots)})
		if err == nil {
			err = p.pin(res.GetImage())
		}
		m.fact(func(now time.Time) { m.prepared(now, n, p, err) })
	}
	n.prepares[name] = p
	m.hold(n, name, false) // until it has it again
	m.nextPrepare(n)
	return p
}

// nextPrepare starts those that wait, as many as may be.
func (m *Manager) nextPrepare(n *node) {
	running := 0
	for _, p := range n.prepares {
		if p.started {
			running++
		}
	}
	for _, p := range n.prepares {
		if p.run != nil && !p.started && running < prepareParallel {
			p.started = true
			running++
			m.call(n, p.run)
		}
	}
}

func (m *Manager) prepared(now time.Time, n *node, p *prepare, err error) {
	p.err, p.started, p.run = err, false, nil
	m.unsettle(n)
	close(p.done)
	revision := p.revision
	if name := revision.GetName(); n.prepares[name] == p && !n.removed {
		m.hold(n, name, err == nil)
	}
	p.then(now, err)
	result := "ok"
	if err != nil {
		result = "error"
		m.log.Warn("prepare", "node", n.name, "revision", revision.GetName(), "image", revision.GetImage(), "err", err)
	}
	m.metrics.prepares.WithLabelValues(result).Inc()
	m.nextPrepare(n)
}

// awaitPrepared waits until the present Revision of a Function is on all nodes that are there. An error names the first that failed.
func (m *Manager) awaitPrepared(ctx context.Context, name string) error {
	m.mu.Lock()
	var waits []*prepare
	f := m.functions[name]
	var homes []*node
	if f != nil {
		homes = m.homes(f)
	}
	for _, n := range homes {
		p := n.prepares[f.revision.GetName()]
		if p == nil || p.run == nil && !n.has(f.revision.GetName()) {
			p = m.prepareFunction(n, f)
		}
		waits = append(waits, p)
	}
	m.mu.Unlock()
	if len(waits) == 0 {
		return unavailable(fmt.Errorf("function %s is stored, but not prepared: %w", name, errNoNode))
	}
	for _, p := range waits {
		select {
		case <-p.done:
		case <-ctx.Done():
			return connect.NewError(codeOf(ctx), fmt.Errorf("function %s is stored, and still being prepared: %w", name, ctx.Err()))
		}
		m.mu.Lock()
		err := p.err
		m.mu.Unlock()
		if err != nil {
			return connect.NewError(connect.CodeOf(err), fmt.Errorf("function %s is stored, but could not be prepared: %s", name, message(err)))
		}
	}
	return nil
}

// forgetOld lets nodes forget the Revisions that were replaced and have no Instances left.
func (m *Manager) forgetOld() {
	for f := range m.attended {
		for name, revision := range f.old {
			if f.deleting || m.revisionInUse(f.name, name) {
				continue
			}
			delete(f.old, name)
			m.attend(f)
			m.do(func(ctx context.Context) {
				// The image stays: the Revision that came after may be of the same.
				if err := m.forgetOn(ctx, revision, false); err != nil {
					m.log.Warn("forget", "revision", revision.GetName(), "err", err)
				}
			})
		}
	}
}

// forgetAll lets nodes forget all Revisions of a deleted Function, and closes gone when they have.
func (m *Manager) forgetAll(f *function) {
	m.do(func(ctx context.Context) {
		defer close(f.gone)
		for _, revision := range f.old {
			if err := m.forget(ctx, revision); err != nil {
				m.log.Warn("forget", "revision", revision.GetName(), "err", err)
			}
		}
	})
}

func (m *Manager) revisionInUse(function, name string) bool {
	for i := range m.index.functions[function] {
		if i.revision == name {
			return true
		}
	}
	return false
}

// forget has every node that is there drop a Revision's snapshots, and its image if no Function has that any more.
func (m *Manager) forget(ctx context.Context, revision *hearthv1.Revision) error {
	m.mu.Lock()
	removeImage := true
	for _, f := range m.functions {
		if f.revision.GetName() != revision.GetName() && shareBytes(f, revision) {
			removeImage = false
		}
	}
	m.mu.Unlock()
	return m.forgetOn(ctx, revision, removeImage)
}

// shareBytes says whether a Function is of the same image, or of the same code, as a Revision.
func shareBytes(f *function, r *hearthv1.Revision) bool {
	if code := r.GetCode().GetPackage(); code != "" {
		return f.revision.GetCode().GetPackage() == code
	}
	return r.GetImage() != "" && (f.revision.GetImage() == r.GetImage() || f.spec.GetImage() == r.GetImage())
}

func (m *Manager) forgetOn(ctx context.Context, revision *hearthv1.Revision, removeImage bool) error {
	ctx, cancel := context.WithTimeout(ctx, forgetTime)
	defer cancel()
	m.mu.Lock()
	var up []*node
	for _, n := range m.nodes {
		if p := n.prepares[revision.GetName()]; p != nil && p.run == nil {
			m.dropPrepared(n, revision.GetName())
		}
		if n.synced {
			up = append(up, n)
		}
	}
	m.mu.Unlock()
	var errs []error
	for _, n := range up {
		if err := n.client.ForgetRevision(ctx, &hearthv1.ForgetRevisionRequest{Revision: revision, RemoveImage: removeImage}); err != nil {
			errs = append(errs, fmt.Errorf("node %s: forget revision %s: %w", n.name, revision.GetName(), err))
		}
	}
	return errors.Join(errs...)
}
