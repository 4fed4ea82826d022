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

// prepare is one Revision's image on its way to one node. Guarded by Manager.mu, but for done.
type prepare struct {
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

// prepareOn has a Function's present Revision prepared on a node, or joins that. One that is done is done again: after a restart
// the node may have less than it had, and what it has costs it nothing.
func (m *Manager) prepareOn(n *node, f *function) *prepare {
	revision := f.revision
	if p := n.prepares[revision.GetName()]; p != nil {
		select {
		case <-p.done:
		default:
			return p
		}
	}
	p := &prepare{done: make(chan struct{})}
	p.run = func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, prepareTime)
		defer cancel()
		res, err := n.client.PrepareRevision(ctx, &hearthv1.PrepareRevisionRequest{Revision: revision, Snapshots: int32(m.config.Snapshots)})
		if err == nil {
			err = m.pin(f.name, revision.GetName(), res.GetImage())
		}
		m.fact(func(time.Time) { m.prepared(n, revision, p, err) })
	}
	n.prepares[revision.GetName()] = p
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
			m.do(p.run)
		}
	}
}

func (m *Manager) prepared(n *node, revision *hearthv1.Revision, p *prepare, err error) {
	p.err, p.started, p.run = err, false, nil
	close(p.done)
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
	for _, n := range m.nodes {
		if f == nil || !n.synced {
			continue
		}
		p := n.prepares[f.revision.GetName()]
		if p == nil || p.run == nil && !n.has(f.revision.GetName()) {
			p = m.prepareOn(n, f)
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
			return connect.NewError(connect.CodeOf(err), fmt.Errorf("function %s is stored, but its image could not be prepared: %s", name, message(err)))
		}
	}
	return nil
}

// forgetOld lets nodes forget the Revisions that were replaced and have no Instances left.
func (m *Manager) forgetOld() {
	for _, f := range m.functions {
		for name, revision := range f.old {
			if m.revisionInUse(name) {
				continue
			}
			delete(f.old, name)
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

func (m *Manager) revisionInUse(name string) bool {
	for _, i := range m.instances {
		if i.revision == name && i.state != hearthv1.State_STATE_GONE {
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
		if f.revision.GetName() != revision.GetName() && (f.revision.GetImage() == revision.GetImage() || f.spec.GetImage() == revision.GetImage()) {
			removeImage = false
		}
	}
	m.mu.Unlock()
	return m.forgetOn(ctx, revision, removeImage)
}

func (m *Manager) forgetOn(ctx context.Context, revision *hearthv1.Revision, removeImage bool) error {
	ctx, cancel := context.WithTimeout(ctx, forgetTime)
	defer cancel()
	m.mu.Lock()
	var up []*node
	for _, n := range m.nodes {
		if p := n.prepares[revision.GetName()]; p != nil && p.run == nil {
			delete(n.prepares, revision.GetName())
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
