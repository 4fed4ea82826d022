package pool

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool/store"
)

const (
	defaultMax         = 10
	defaultPort        = 8080
	defaultConcurrency = 10
	defaultFrozen      = 1
	// internalDeadline is for Instances that nobody waits for; it leaves time for an image's pull.
	internalDeadline = 2 * time.Minute
	// minAge is how long an Instance serves at least before the scaler may give it up: two reports of every gateway, and some.
	minAge = 3 * time.Second
)

func newFunction(r store.Record) *function {
	f := &function{name: r.Name, old: map[string]*hearthv1.Revision{}, gone: make(chan struct{})}
	f.adopt(r)
	return f
}

// adopt takes over a stored record.
func (f *function) adopt(r store.Record) {
	f.spec, f.revision, f.serial = r.Function.GetSpec(), r.Revision, r.Serial
	f.status = r.Function.GetStatus()
	if f.revision.GetConcurrency() == 0 { // stored before Revisions had it
		f.revision = proto.CloneOf(f.revision)
		f.revision.Concurrency = concurrencyOf(f.spec)
	}
	s := f.spec.GetScaling()
	f.public = withoutSecrets(f.spec)
	f.scaling = bounds{min: int(s.GetMin()), max: int(s.GetMax()), frozen: max(0, int(s.GetFrozen()))}
	if f.scaling.max == 0 {
		f.scaling.max = max(defaultMax, f.scaling.min)
	}
	if s.GetFrozen() == 0 {
		f.scaling.frozen = defaultFrozen
	}
}

// withoutSecrets is a spec as others may see it: the names of the secrets are there, what they are is not.
func withoutSecrets(spec *hearthv1.FunctionSpec) *hearthv1.FunctionSpec {
	if len(spec.GetSecrets()) == 0 {
		return spec
	}
	out := proto.CloneOf(spec)
	for name := range out.Secrets {
		out.Secrets[name] = nil
	}
	return out
}

// keepSecrets gives a spec the values of the secrets that it only names: who changes what he was shown changes no secret by that.
func keepSecrets(before *function, spec *hearthv1.FunctionSpec) error {
	for name, value := range spec.GetSecrets() {
		if len(value) > 0 {
			continue
		}
		known := []byte(nil)
		if before != nil {
			known = before.spec.GetSecrets()[name]
		}
		if len(known) == 0 {
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("spec.secrets: %s is empty, and there is no value of before to keep", name))
		}
		spec.Secrets[name] = known
	}
	return nil
}

func concurrencyOf(spec *hearthv1.FunctionSpec) int32 {
	if n := spec.GetScaling().GetConcurrency(); n > 0 {
		return n
	}
	return defaultConcurrency
}

// revise makes the record of a Function with a new spec. Its Revision stays if no Instance would notice the change.
func revise(now time.Time, before *function, name string, serial int64, spec *hearthv1.FunctionSpec) store.Record {
	r := store.Record{Name: name, Serial: serial, Function: &hearthv1.Function{Name: name, Spec: spec}}
	status := &hearthv1.FunctionStatus{Generation: 1, CreatedAt: timestamppb.New(now), UpdatedAt: timestamppb.New(now)}
	revision := &hearthv1.Revision{Function: name, Image: spec.GetImage(), Port: spec.GetPort(), Env: spec.GetEnv(),
		Command: spec.GetCommand(), Args: spec.GetArgs(), Resources: spec.GetResources(), Code: spec.GetCode(), Secrets: spec.GetSecrets(),
		Concurrency: concurrencyOf(spec), Tenant: spec.GetTenant(), Group: spec.GetGroup(), WritableRoot: spec.GetWritableRoot()}
	if revision.Port == 0 {
		revision.Port = defaultPort
	}
	if spec.GetRuntime() != "" {
		revision.Runtime = &hearthv1.Runtime{Name: spec.GetRuntime()}
	}
	if before != nil {
		status.Generation, status.CreatedAt = before.status.GetGeneration()+1, before.status.GetCreatedAt()
		if before.spec.GetImage() == spec.GetImage() {
			revision.Image = before.revision.GetImage() // by digest
		}
		revision.Name = before.revision.GetName()
		if proto.Equal(revision, before.revision) {
			r.Revision = before.revision
		}
	}
	if r.Revision == nil {
		r.Serial++
		revision.Name = fmt.Sprintf("%s-%05d", name, r.Serial)
		if before != nil && before.revision.GetImage() == revision.Image {
			revision.Image = spec.GetImage() // a new Revision resolves anew
		}
		r.Revision = revision
	}
	status.Revision = r.Revision.GetName()
	r.Function.Status = status
	return r
}

// apply stores a Function whose spec was validated. One that is as it was is left alone.
func (m *Manager) apply(name string, spec *hearthv1.FunctionSpec) error {
	m.applies.Lock()
	defer m.applies.Unlock()
	m.mu.Lock()
	before, serial, open := m.functions[name], m.serials[name], m.running
	ground := m.runtimes[spec.GetRuntime()]
	m.mu.Unlock()
	// before's fields change under applies alone, so that reading them needs no mutex more.
	spec = proto.CloneOf(spec)
	switch {
	case !open:
		return unavailable(errShutdown)
	case before != nil && before.deleting:
		return connect.NewError(connect.CodeAborted, fmt.Errorf("function %s is being deleted; apply it again when that is done", name))
	case spec.GetRuntime() != "" && (ground == nil || ground.current == nil):
		return connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("spec.runtime: there is no runtime %q; make it with `hearth runtime apply %s --image REF`", spec.GetRuntime(), spec.GetRuntime()))
	}
	if err := keepSecrets(before, spec); err != nil {
		return err
	}
	if before != nil && proto.Equal(before.spec, spec) {
		return nil
	}
	r := revise(time.Now(), before, name, serial, spec)
	if err := m.config.Store.Put(r); err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	m.fact(func(now time.Time) { m.applied(now, before, r) })
	return nil
}

func (m *Manager) applied(now time.Time, f *function, r store.Record) {
	m.serials[r.Name] = r.Serial
	delete(m.tombstones, r.Name)
	if f == nil {
		f = newFunction(r)
		m.functions[r.Name] = f
	} else {
		if old := f.revision; old.GetName() != r.Revision.GetName() {
			f.old[old.GetName()] = old
			f.failures, f.lastErr = 0, ""
		}
		f.adopt(r)
	}
	m.changed[f] = struct{}{}
	m.attend(f)
	for i := range m.index.functions[f.name] {
		m.place(i)
	}
	m.thin(now, f)
	m.log.Info("function applied", "function", f.name, "generation", f.status.GetGeneration(), "revision", f.revision.GetName())
	for _, n := range m.homes(f) {
		m.prepareFunction(n, f)
	}
}

// pin fixes the image of a Revision that was resolved on a node, so that every Instance of it runs the same bytes. Code has its
// digest from the beginning.
func (m *Manager) pin(name, revision, image string) error {
	m.applies.Lock()
	defer m.applies.Unlock()
	m.mu.Lock()
	f := m.functions[name]
	if image == "" || f == nil || f.deleting || f.spec.GetImage() == "" || f.revision.GetName() != revision || f.revision.GetImage() != f.spec.GetImage() || image == f.revision.GetImage() {
		m.mu.Unlock()
		return nil
	}
	pinned := proto.CloneOf(f.revision)
	pinned.Image = image
	r := store.Record{Name: name, Serial: f.serial, Revision: pinned, Function: &hearthv1.Function{Name: name, Spec: f.spec, Status: f.status}}
	m.mu.Unlock()
	if err := m.config.Store.Put(r); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	f.revision = pinned
	return nil
}

// delete drains a Function's Instances, has its Revisions forgotten, and waits for that until ctx ends; it goes on without.
func (m *Manager) delete(ctx context.Context, name string) error {
	m.applies.Lock()
	m.mu.Lock()
	f := m.functions[name]
	m.mu.Unlock()
	if f == nil {
		m.applies.Unlock()
		return noFunction(name)
	}
	// First on disk: after a crash in between, Instances of an unknown Function are discarded.
	if err := m.config.Store.Delete(name); err != nil {
		m.applies.Unlock()
		return connect.NewError(connect.CodeInternal, err)
	}
	m.fact(func(now time.Time) { m.deleteNow(now, f) })
	m.applies.Unlock()
	select {
	case <-f.gone:
		return nil
	case <-ctx.Done():
		return connect.NewError(codeOf(ctx), fmt.Errorf("function %s is being deleted, and still has instances that drain: %w", name, ctx.Err()))
	}
}

func (m *Manager) deleteNow(now time.Time, f *function) {
	f.deleting = true
	m.attend(f)
	m.log.Info("function deleted", "function", f.name)
	for _, a := range m.allocations {
		if a.function == f.name && !a.finished() && a.inst == nil {
			m.finish(now, a, nil, noFunction(f.name))
		}
	}
	for _, i := range m.of(f.name) {
		m.release(now, i, toDiscard)
	}
}

// of lists the Instances that a Function has, or that are being claimed for it.
func (m *Manager) of(name string) []*instance {
	return slices.Collect(maps.Keys(m.index.functions[name]))
}

// finishDeletions ends Functions of which nothing is left.
func (m *Manager) finishDeletions() {
	for f := range m.attended {
		name := f.name
		if !f.deleting || len(m.index.functions[name]) > 0 {
			continue
		}
		delete(m.functions, name)
		delete(m.attended, f)
		f.old[f.revision.GetName()] = f.revision
		m.version++
		m.tombstones[name] = m.version
		m.send(&hearthv1.Endpoints{Function: name, Version: m.version, Deleted: true})
		m.forgetAll(f)
	}
}

// attend notes whether there is something to do for a Function even while nothing of it changes: a minimum to keep, a deletion to
// end, Revisions to forget.
func (m *Manager) attend(f *function) {
	m.miss(f.name)
	if f.deleting || f.scaling.min > 0 || len(f.old) > 0 {
		m.attended[f] = struct{}{}
		return
	}
	delete(m.attended, f)
}

// miss has the next step look whether a Function has fewer Instances than its minimum. Whoever changes what counts for that calls it: place
// does for Instances.
func (m *Manager) miss(name string) {
	if f := m.functions[name]; f != nil && f.scaling.min > 0 {
		m.lacking[f] = struct{}{}
	}
}

// reserve begins Instances for Functions that have fewer than their minimum.
func (m *Manager) reserve(now time.Time) {
	for f := range m.lacking {
		c := m.count(f)
		lacks := f.scaling.min - c.ready - c.starting
		switch {
		case m.functions[f.name] != f || f.deleting || lacks <= 0:
			delete(m.lacking, f)
		case f.failures >= maxFailures && now.Before(f.retry):
			m.at(f.retry)
		case m.up > 0:
			m.start(now, f, lacks)
		}
	}
}

// start begins n Instances that nobody waits for.
func (m *Manager) start(now time.Time, f *function, n int) {
	for ; n > 0; n-- {
		a, err := m.begin(now, f.name, newID("s-"), now.Add(internalDeadline))
		if err != nil {
			return
		}
		a.internal = true
	}
}

// rollOut drains Instances of earlier Revisions once the present one serves; if only earlier ones do, it begins one.
func (m *Manager) rollOut(now time.Time) {
	outdated := map[*function][]*instance{}
	for i := range m.index.outdated {
		if f := m.functions[i.function]; f != nil && !f.deleting {
			outdated[f] = append(outdated[f], i)
		}
	}
	for f, old := range outdated {
		c := m.count(f)
		switch {
		case c.ready > 0:
			for _, i := range old {
				m.release(now, i, toDiscard)
			}
		case c.starting > 0 || m.up == 0:
		case f.failures >= maxFailures && now.Before(f.retry):
			m.at(f.retry)
		default:
			m.start(now, f, 1)
		}
	}
}

// listedAtOnce is how many Functions are described before others get the mutex: a claim must not wait for a list of thousands.
const listedAtOnce = 100

// Functions lists those of the names that there are, or without names all, with their status. What it returns must not be changed.
func (m *Manager) Functions(names ...string) (all []*hearthv1.Function) {
	if len(names) == 0 {
		m.mu.Lock()
		names = slices.Collect(maps.Keys(m.functions))
		m.mu.Unlock()
	}
	for some := range slices.Chunk(names, listedAtOnce) {
		all = m.appendFunctions(all, some)
	}
	return all
}

func (m *Manager) appendFunctions(all []*hearthv1.Function, names []string) []*hearthv1.Function {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range names {
		if f := m.functions[name]; f != nil && !f.deleting {
			all = append(all, m.message(f))
		}
	}
	return all
}

func (m *Manager) message(f *function) *hearthv1.Function {
	c := m.count(f)
	return &hearthv1.Function{Name: f.name, Spec: f.public, Status: &hearthv1.FunctionStatus{
		Generation: f.status.GetGeneration(), Revision: f.revision.GetName(), Ready: int32(c.ready), Starting: int32(c.starting),
		Desired: int32(f.desired), Reason: f.reason, Error: f.lastErr, CreatedAt: f.status.GetCreatedAt(), UpdatedAt: f.status.GetUpdatedAt(),
	}}
}

// Scale begins Instances of a Function up to desired, or releases those that are more. It does not block. Most of what the scaler says,
// of each Function each second, changes nothing, and costs next to nothing.
func (m *Manager) Scale(name string, desired int, reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.functions[name]
	if f == nil || f.deleting || m.closed {
		return
	}
	desired = min(max(desired, f.scaling.min), f.scaling.max)
	f.desired, f.reason = desired, reason
	c, now := m.count(f), time.Now()
	switch lacks := desired - c.ready - c.starting; {
	case lacks > 0 && m.up > 0:
		m.start(now, f, lacks)
	case c.ready > desired:
		m.shrinkTo(now, f, desired, c.ready)
	default:
		return
	}
	m.step(now)
}

func (m *Manager) shrinkTo(now time.Time, f *function, desired, ready int) {
	var all []serving
	for _, i := range m.of(f.name) {
		if !i.routable() || i.revision != f.revision.GetName() {
			continue
		}
		s := serving{id: i.id, since: i.serving}
		for _, sub := range m.subscribers {
			s.inFlight += int(sub.inFlight[i.id])
		}
		all = append(all, s)
	}
	for _, id := range shrink(now, all, ready-desired, minAge) {
		m.release(now, m.instances[id], toFreeze)
	}
}

// get returns one Function.
func (m *Manager) get(name string) (*hearthv1.Function, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.functions[name]
	if f == nil {
		return nil, noFunction(name)
	}
	return m.message(f), nil
}
