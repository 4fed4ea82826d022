package pool

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool/store"
)

// runtime is a Runtime, or the memory of one that was deleted: generations of a name are never used twice.
//
// A changed Runtime makes no new Revisions: it is the ground that Functions stand on, as a node's kernel is, and a Revision is started
// with what its Runtime is then. Warm Instances of an older generation are replaced, frozen ones given up; those that serve go on
// with what they began with.
type runtime struct {
	name string
	// applied is what the user gave; current has its image by digest, once a node has resolved it. Both are nil when it is deleted.
	applied, current *hearthv1.Runtime
	generation       int64
	language         string // by a loader's account; empty until one has booted in this term
}

func (r *runtime) kind() kind { return kind{runtime: r.name, generation: r.generation} }

func newRuntime(r store.Runtime) *runtime {
	out := &runtime{name: r.Name, generation: r.Generation}
	if r.Applied != nil {
		out.applied, out.current = r.Applied, proto.CloneOf(r.Applied)
		if r.Image != "" {
			out.current.Image = r.Image
		}
	}
	return out
}

func (r *runtime) record() store.Runtime {
	return store.Runtime{Name: r.name, Generation: r.generation, Applied: r.applied, Image: r.current.GetImage()}
}

// image is a Revision that stands for the Runtime alone, to have its image on a node. Its name can be no Function's: theirs end in
// a number.
func (r *runtime) image() *hearthv1.Revision {
	return &hearthv1.Revision{Name: r.imageName(), Function: r.name + "-runtime", Image: r.current.GetImage(), Port: defaultPort}
}

// isRuntimeImage says whether what is prepared under a name is a Runtime's image.
func (m *Manager) isRuntimeImage(name string) bool {
	for _, r := range m.runtimes {
		if r.current != nil && r.imageName() == name {
			return true
		}
	}
	return false
}

func (r *runtime) imageName() string { return fmt.Sprintf("%s-runtime-g%d", r.name, r.generation) }

// complete is a Function's Revision with all that a node needs: its Runtime as it is now.
func (m *Manager) complete(f *function) *hearthv1.Revision {
	r := m.runtimes[f.spec.GetRuntime()]
	if r == nil || r.current == nil {
		return f.revision
	}
	if c := f.complete; c == nil || c.GetName() != f.revision.GetName() || c.GetRuntime() != r.current {
		f.complete = proto.CloneOf(f.revision)
		f.complete.Runtime = r.current
	}
	return f.complete
}

// prepareRuntime has a Runtime's image on a node.
func (m *Manager) prepareRuntime(n *node, r *runtime) *prepare {
	revision := r.image()
	return m.prepareOn(n, &prepare{
		revision: revision,
		pin:      func(image string) error { return m.pinRuntime(r.name, r.generation, image) },
		then: func(now time.Time, err error) {
			if err != nil && m.current(r.kind()) {
				n.supply(r.name).failed(now, err)
			}
			m.tellStocked()
		},
	})
}

// ready says whether Instances of a kind can be made on a node: a Runtime's image has to be there, or its pull would be taken for a
// boot that hangs. One that could not be had is asked for again.
func (m *Manager) ready(now time.Time, n *node, k kind) bool {
	if k.runtime == "" {
		return true
	}
	r := m.runtimes[k.runtime]
	name := r.imageName()
	if n.has(name) {
		return true
	}
	if p := n.prepares[name]; p == nil || p.run == nil {
		if retry := n.supply(k.runtime).retry; now.Before(retry) {
			m.lookAgain(n, retry)
			return false
		}
		m.prepareRuntime(n, r)
	}
	return false
}

// pinRuntime fixes the image of a Runtime that was resolved on a node, so that all its Instances boot the same bytes.
func (m *Manager) pinRuntime(name string, generation int64, image string) error {
	m.applies.Lock()
	defer m.applies.Unlock()
	m.mu.Lock()
	r := m.runtimes[name]
	if image == "" || r == nil || r.current == nil || r.generation != generation || r.current.GetImage() != r.applied.GetImage() || image == r.current.GetImage() {
		m.mu.Unlock()
		return nil
	}
	pinned := &runtime{name: name, applied: r.applied, current: proto.CloneOf(r.current), generation: generation, language: r.language}
	pinned.current.Image = image
	m.mu.Unlock()
	if err := m.config.Store.PutRuntime(pinned.record()); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.runtimes[name] = pinned
	return nil
}

// ApplyRuntime is RuntimeService's. One that is as it was is left alone, or tried again if it could not be booted.
func (m *Manager) ApplyRuntime(ctx context.Context, req *connect.Request[hearthv1.ApplyRuntimeRequest]) (*connect.Response[hearthv1.ApplyRuntimeResponse], error) {
	spec := req.Msg.GetRuntime()
	if err := ValidateRuntime(spec); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := m.applyRuntime(spec); err != nil {
		return nil, err
	}
	if req.Msg.GetPrepare() {
		if err := m.awaitStocked(ctx, spec.GetName()); err != nil {
			return nil, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.runtimes[spec.GetName()]
	if r.current == nil {
		return nil, noRuntime(spec.GetName())
	}
	return connect.NewResponse(&hearthv1.ApplyRuntimeResponse{Runtime: m.describe(r)}), nil
}

func (m *Manager) applyRuntime(spec *hearthv1.Runtime) error {
	m.applies.Lock()
	defer m.applies.Unlock()
	m.mu.Lock()
	before, open := m.runtimes[spec.GetName()], m.running
	m.mu.Unlock()
	if !open {
		return unavailable(errShutdown)
	}
	applied := proto.CloneOf(spec)
	applied.Status, applied.Generation = nil, 1
	if before != nil {
		if applied.Generation = before.generation; before.applied != nil && proto.Equal(before.applied, applied) {
			m.fact(func(time.Time) { m.tryAgain(before) })
			return nil
		}
		applied.Generation++
	}
	record := store.Runtime{Name: applied.GetName(), Generation: applied.GetGeneration(), Applied: applied}
	if err := m.config.Store.PutRuntime(record); err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	m.fact(func(now time.Time) { m.runtimeApplied(now, before, newRuntime(record)) })
	return nil
}

// tryAgain forgets why a Runtime could not be booted, for whoever applies it as it was has put that right.
func (m *Manager) tryAgain(r *runtime) {
	for _, n := range m.nodes {
		if s := n.supplies[r.name]; s != nil && s.lastErr != "" {
			delete(n.supplies, r.name)
			m.unsettle(n)
			if n.synced && !n.has(r.imageName()) {
				m.prepareRuntime(n, r)
			}
		}
	}
}

func (m *Manager) runtimeApplied(now time.Time, before, r *runtime) {
	m.runtimes[r.name] = r
	m.log.Info("runtime applied", "runtime", r.name, "generation", r.generation)
	for _, n := range m.nodes {
		delete(n.supplies, r.name)
		m.unsettle(n)
		if n.synced {
			m.prepareRuntime(n, r)
		}
	}
	for _, f := range m.functions {
		if f.deleting || f.spec.GetRuntime() != r.name {
			continue
		}
		m.thin(now, f)
		f.failures, f.lastErr = 0, "" // what failed before says nothing of this one
		for _, n := range m.homes(f) {
			m.prepareFunction(n, f)
		}
	}
	if before != nil && before.current != nil {
		m.forgetRuntime(before, before.applied.GetImage() != r.applied.GetImage())
	}
}

// forgetRuntime lets nodes forget a generation that is not used any more. What still serves in it keeps its image there.
func (m *Manager) forgetRuntime(r *runtime, withImage bool) {
	m.do(func(ctx context.Context) {
		if err := m.forgetOn(ctx, r.image(), withImage); err != nil {
			m.log.Warn("forget", "runtime", r.name, "generation", r.generation, "err", err)
		}
	})
}

// DeleteRuntime is RuntimeService's. It returns when the warm Instances are gone; ctx bounds that.
func (m *Manager) DeleteRuntime(ctx context.Context, req *connect.Request[hearthv1.DeleteRuntimeRequest]) (*connect.Response[hearthv1.DeleteRuntimeResponse], error) {
	name := req.Msg.GetName()
	warm, err := m.deleteRuntime(name)
	if err != nil {
		return nil, err
	}
	for _, i := range warm {
		select {
		case <-i.gone:
		case <-ctx.Done():
			return nil, connect.NewError(codeOf(ctx), fmt.Errorf("runtime %s is deleted, and instance %s still ends: %w", name, i.id, ctx.Err()))
		}
	}
	return connect.NewResponse(&hearthv1.DeleteRuntimeResponse{}), nil
}

func (m *Manager) deleteRuntime(name string) (warm []*instance, err error) {
	m.applies.Lock()
	defer m.applies.Unlock()
	m.mu.Lock()
	r, open := m.runtimes[name], m.running
	var users []string
	for _, f := range m.functions {
		if f.spec.GetRuntime() == name {
			users = append(users, f.name)
		}
	}
	m.mu.Unlock()
	slices.Sort(users)
	switch {
	case r == nil || r.current == nil:
		return nil, noRuntime(name)
	case !open:
		return nil, unavailable(errShutdown)
	case len(users) > 0:
		return nil, connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("runtime %s is used by %d functions (%s); delete those first", name, len(users), strings.Join(users[:min(len(users), 5)], ", ")))
	}
	if err := m.config.Store.PutRuntime(store.Runtime{Name: name, Generation: r.generation}); err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	m.fact(func(now time.Time) {
		m.runtimes[name] = &runtime{name: name, generation: r.generation}
		m.log.Info("runtime deleted", "runtime", name)
		for k, nodes := range m.index.spare {
			for _, all := range nodes {
				if k.runtime == name {
					warm = slices.AppendSeq(warm, maps.Keys(all))
				}
			}
		}
		for _, n := range m.nodes {
			delete(n.supplies, name)
			m.unsettle(n)
		}
		m.forgetRuntime(r, true)
	})
	return warm, nil
}

// ListRuntimes is RuntimeService's; in the order of names.
func (m *Manager) ListRuntimes(context.Context, *connect.Request[hearthv1.ListRuntimesRequest]) (*connect.Response[hearthv1.ListRuntimesResponse], error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	res := &hearthv1.ListRuntimesResponse{}
	for _, name := range slices.Sorted(maps.Keys(m.runtimes)) {
		if r := m.runtimes[name]; r.current != nil {
			res.Runtimes = append(res.Runtimes, m.describe(r))
		}
	}
	return connect.NewResponse(res), nil
}

// describe is a Runtime with its status.
func (m *Manager) describe(r *runtime) *hearthv1.Runtime {
	out := proto.CloneOf(r.current)
	out.Status = &hearthv1.RuntimeStatus{Error: strings.Join(m.supplyErrors(r.name), "; "), Language: r.language}
	for _, all := range m.index.spare[r.kind()] {
		out.Status.Warm += int32(len(all))
	}
	return out
}

// awaitStocked waits until a Runtime's warm Instances are booted on all nodes that are there. An error is of the first node that
// could not.
func (m *Manager) awaitStocked(ctx context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		done, err := m.stocked(name)
		if done || err != nil {
			return err
		}
		more := m.news
		m.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
		}
		m.mu.Lock()
		if ctx.Err() != nil {
			return connect.NewError(codeOf(ctx), fmt.Errorf("runtime %s is stored, and still being prepared: %w", name, ctx.Err()))
		}
	}
}

func (m *Manager) stocked(name string) (bool, error) {
	r := m.runtimes[name]
	switch {
	case r == nil || r.current == nil:
		return false, noRuntime(name)
	case m.closed:
		return false, unavailable(errShutdown)
	case m.up == 0:
		return false, unavailable(fmt.Errorf("runtime %s is stored, but not prepared: %w", name, errNoNode))
	}
	if errs := m.supplyErrors(name); len(errs) > 0 {
		return false, connect.NewError(connect.CodeInternal, fmt.Errorf("runtime %s is stored, but does not boot: %s", name, strings.Join(errs, "; ")))
	}
	for _, n := range m.nodes {
		if n.synced && !n.info.Cordoned && (!n.has(r.imageName()) || len(m.index.spare.at(place{n.name, r.kind()})) < m.size(n, r.name)) {
			return false, nil
		}
	}
	return true, nil
}

// tellStocked wakes those who wait for warm Instances. Guarded by mu.
func (m *Manager) tellStocked() {
	close(m.news)
	m.news = make(chan struct{})
}
