package pool

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	defaultDeadline = 30 * time.Second
	maxDeadline     = time.Hour
	maxIDBytes      = 128
	// remember is how long a finished allocation answers to its id.
	remember = 2 * time.Minute
	// retryFirst and retryMost shape the attempts of one allocation; the first two follow at once.
	retryFirst = 50 * time.Millisecond
	retryMost  = time.Second
	freeTries  = 2
	// maxFailures starts of a Function may fail in a row; then it rests between restFirst and restMost.
	maxFailures = 3
	restFirst   = time.Second
	restMost    = time.Minute
)

// newID makes a name that is unique for ever, and fit for a host name.
func newID(prefix string) string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return prefix + hex.EncodeToString(b[:])
}

// allocate joins the allocation of that id, or begins one, and waits for it. One that has no Instance yet ends when nobody waits
// any more; one that has goes on: its Instance is for the next who asks.
func (m *Manager) allocate(ctx context.Context, name, id string, deadline time.Time) (*hearthv1.AllocateResponse, error) {
	a, err := m.join(name, id, deadline)
	if err != nil {
		return nil, err
	}
	select {
	case <-a.done:
	case <-ctx.Done():
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	a.callers--
	if a.finished() {
		m.forgetFailed(a)
		return a.response, a.err
	}
	if a.callers == 0 && a.inst == nil && !a.internal {
		now := time.Now()
		m.finish(now, a, nil, connect.NewError(connect.CodeCanceled, errors.New("the caller went away")))
		m.step(now)
	}
	return nil, connect.NewError(codeOf(ctx), fmt.Errorf("wait for an instance of %s: %w", name, ctx.Err()))
}

func codeOf(ctx context.Context) connect.Code {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return connect.CodeDeadlineExceeded
	}
	return connect.CodeCanceled
}

func (m *Manager) join(name, id string, deadline time.Time) (*allocation, error) {
	came := time.Now()
	if id == "" {
		id = newID("a-")
	}
	if len(id) > maxIDBytes || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("id: %.40q is not 1 to %d printable characters", id, maxIDBytes))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if a := m.allocations[id]; a != nil && !m.stillGood(a) {
		delete(m.allocations, id)
	}
	if a := m.allocations[id]; a != nil {
		if a.function != name {
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("id: %q is an allocation of function %s", id, a.function))
		}
		a.callers++
		return a, nil
	}
	now := time.Now()
	a, err := m.begin(now, name, id, deadline)
	if err != nil {
		m.metrics.allocations.WithLabelValues(connect.CodeOf(err).String()).Inc()
		return nil, err
	}
	a.callers++
	a.came = came
	m.step(now)
	return a, nil
}

// stillGood says whether an allocation's answer holds: its Instance may have been given up since, and be frozen or another claim's.
func (m *Manager) stillGood(a *allocation) bool {
	if a.response == nil {
		return true
	}
	got := a.response.GetInstance()
	i := m.instances[got.GetId()]
	return i != nil && i.routable() && i.claim.GetId() == got.GetClaim().GetId()
}

// begin puts a new allocation into the queue, if its Function may have another Instance.
func (m *Manager) begin(now time.Time, name, id string, deadline time.Time) (*allocation, error) {
	f := m.functions[name]
	if f == nil || f.deleting {
		return nil, noFunction(name)
	}
	if !m.running {
		return nil, unavailable(errShutdown)
	}
	if deadline.IsZero() {
		deadline = now.Add(defaultDeadline)
	}
	if deadline.After(now.Add(maxDeadline)) {
		deadline = now.Add(maxDeadline)
	}
	if !deadline.After(now) {
		return nil, connect.NewError(connect.CodeDeadlineExceeded, errors.New("the deadline has passed"))
	}
	a := &allocation{id: id, function: name, begun: now, deadline: deadline, done: make(chan struct{})}
	switch i := m.earlier(f, id); {
	case i == nil:
	case i.routable(): // made before a restart of ours; its answer was lost
		m.enter(a)
		m.succeed(now, a, i, nil)
		return a, nil
	default: // begun before: the node will say what becomes of it
		m.enter(a)
		a.next = a.deadline
		m.queue = append(m.queue, a)
		return a, nil
	}
	if err := f.mayStart(now, m.count(f)); err != nil {
		return nil, err
	}
	m.enter(a)
	m.queue = append(m.queue, a)
	return a, nil
}

// enter takes in an allocation that is not finished.
func (m *Manager) enter(a *allocation) {
	m.allocations[a.id] = a
	if m.unfinished[a.function] == nil {
		m.unfinished[a.function] = map[*allocation]struct{}{}
	}
	m.unfinished[a.function][a] = struct{}{}
	m.miss(a.function)
}

// earlier finds the Instance that an allocation of an earlier term got, or is getting.
func (m *Manager) earlier(f *function, id string) (found *instance) {
	for i := range m.index.functions[f.name] {
		if allocationOf(i.claim) != id {
			continue
		}
		if i.routable() {
			return i
		}
		if i.pending() && i.state == hearthv1.State_STATE_CLAIMED {
			found = i
		}
	}
	return found
}

// A claim's id is the allocation's with the attempt after a last slash.
func claimID(allocation string, attempt int) string {
	return fmt.Sprintf("%s/%s%d", allocation, newID(""), attempt)
}

func allocationOf(c *hearthv1.Claim) string {
	id := c.GetId()
	for n := len(id) - 1; n >= 0; n-- {
		if id[n] == '/' {
			return id[:n]
		}
	}
	return id
}

// mayStart says why a Function may not have another Instance, if so.
func (f *function) mayStart(now time.Time, c count) error {
	if c.ready+c.starting >= f.scaling.max {
		return connect.NewError(connect.CodeResourceExhausted,
			fmt.Errorf("function %s has its maximum of %d instances (%d of them starting)", f.name, f.scaling.max, c.starting))
	}
	if f.failures < maxFailures {
		return nil
	}
	if now.Before(f.retry) || c.starting > 0 {
		return f.resting(now)
	}
	return nil
}

func (f *function) resting(now time.Time) error {
	return later(now, f.retry, fmt.Errorf("function %s failed to start %d times in a row and rests: %s", f.name, f.failures, f.lastErr))
}

// count of a Function's Instances of its present Revision; what is leaving or frozen does not count.
type count struct{ ready, starting int }

func (m *Manager) count(f *function) count {
	var c count
	for i := range m.index.functions[f.name] {
		switch {
		case i.by != nil || i.revision != f.revision.GetName():
		case i.routable():
			c.ready++
		case i.pending() && !m.queued(i.claim):
			c.starting++
		}
	}
	c.starting += len(m.unfinished[f.name])
	return c
}

// queued says whether the allocation that made a claim still waits, so that it is counted already.
func (m *Manager) queued(c *hearthv1.Claim) bool {
	a := m.allocations[allocationOf(c)]
	return a != nil && !a.finished()
}

// eligible are the queue's allocations that an Instance could be given to now.
func (m *Manager) eligible(now time.Time) []*allocation {
	var out []*allocation
	for _, a := range m.queue {
		if now.Before(a.next) {
			m.at(a.next)
			continue
		}
		out = append(out, a)
	}
	return out
}

// dispatch gives Instances to those who wait, in a fair order.
func (m *Manager) dispatch(now time.Time) {
	if len(m.queue) == 0 {
		return
	}
	limit := m.config.ClaimsPerNode * m.up
	turns, total := m.turns(now)
	seats := seating{}
	for total < limit {
		next := fairest(turns, max(1, limit*3/4))
		if next < 0 {
			return
		}
		t := &turns[next]
		f := m.functions[t.function]
		i := m.pick(f, m.seat(now, seats, f))
		if i == nil {
			turns = slices.Delete(turns, next, next+1) // others may take what this one cannot
			continue
		}
		m.activate(now, f, t.queue[0], i)
		delete(seats, groupOf(f.spec)) // they are other ones now
		total++
		t.inFlight++
		if t.queue = t.queue[1:]; len(t.queue) == 0 {
			turns = slices.Delete(turns, next, next+1)
			continue
		}
		t.waiting = t.queue[0].begun
	}
}

// turns lists the Functions that wait, and counts all claims under way.
func (m *Manager) turns(now time.Time) (turns []turn, total int) {
	inFlight := map[string]int{}
	for i := range m.index.restless {
		if i.by != nil {
			inFlight[i.by.function]++
			total++
		}
	}
	at := map[string]int{}
	for _, a := range m.eligible(now) {
		n, ok := at[a.function]
		if !ok {
			n = len(turns)
			at[a.function] = n
			turns = append(turns, turn{function: a.function, inFlight: inFlight[a.function], waiting: a.begun})
		}
		turns[n].queue = append(turns[n].queue, a)
	}
	return turns, total
}

// pick chooses an Instance for a Function, or none: one that is frozen with its Revision, a booted one of its Runtime, a sandbox. A
// sandbox can become anything, but an image is never put into a booted Runtime. What is to be in a pod that it shares is there, or
// waited for.
func (m *Manager) pick(f *function, pod string) *instance {
	near := m.neighbours(f)
	if frozen := m.frozenOf(f); len(frozen) > 0 {
		each := func(yield func(set) bool) {
			for i := range frozen {
				if !yield(set{i: {}}) {
					return
				}
			}
		}
		if best, ok := choose(m.candidates(f, near, each, hearthv1.Degree_DEGREE_REVISION)); ok {
			return best.of
		}
	}
	own, degree := m.kindFor(f.name).in(pod), hearthv1.Degree_DEGREE_RUNTIME
	if own.runtime == "" {
		degree = hearthv1.Degree_DEGREE_SANDBOX
	}
	if pod == "" {
		own = own.ground()
	}
	if own != (kind{}) {
		if i := m.spareFor(f, near, own, degree); i != nil {
			return i
		}
	}
	if pod == "" {
		return m.spareFor(f, near, kind{}, hearthv1.Degree_DEGREE_SANDBOX)
	}
	return nil
}

// spareFor chooses a spare Instance. Only if there is none where the Revision is prepared are all nodes looked at, which may be hundreds.
func (m *Manager) spareFor(f *function, near map[string]int, k kind, degree hearthv1.Degree) *instance {
	spare := m.index.spare[k]
	if len(spare) == 0 {
		return nil
	}
	prepared := func(yield func(set) bool) {
		for n := range m.holders[f.revision.GetName()] {
			if !yield(spare[n.name]) {
				return
			}
		}
	}
	best, ok := choose(m.candidates(f, near, prepared, degree))
	if !ok {
		best, _ = choose(m.candidates(f, near, maps.Values(spare), degree))
	}
	return best.of
}

// candidates are the oldest of sets of Instances that are each on one node, as far as they can be claimed.
func (m *Manager) candidates(f *function, near map[string]int, sets iter.Seq[set], degree hearthv1.Degree) iter.Seq[candidate] {
	return func(yield func(candidate) bool) {
		for s := range sets {
			var oldest *instance
			for i := range s {
				if !i.refused && (oldest == nil || cmp.Or(i.created.Compare(oldest.created), cmp.Compare(i.id, oldest.id)) < 0) {
					oldest = i
				}
			}
			if oldest == nil {
				continue
			}
			n := m.nodes[oldest.node]
			if !n.synced || n.info.Cordoned {
				continue
			}
			c := candidate{id: oldest.id, of: oldest, degree: degree, beside: near[n.name], inZone: near[n.zone], spares: len(s),
				created: oldest.created, image: n.has(f.revision.GetName())}
			if !yield(c) {
				return
			}
		}
	}
}

// neighbours counts a Function's Instances by node and by zone, none of which is named as the others are.
func (m *Manager) neighbours(f *function) map[string]int {
	if len(m.nodes) < 2 {
		return nil
	}
	near := map[string]int{}
	for i := range m.index.functions[f.name] {
		if n := m.nodes[i.node]; n != nil && i.state != hearthv1.State_STATE_FROZEN && !i.leaving() {
			near[n.name]++
			near[n.zone]++
		}
	}
	return near
}

// activate makes a claim on an Instance and has the node carry it out.
func (m *Manager) activate(now time.Time, f *function, a *allocation, i *instance) {
	n := m.nodes[i.node]
	m.queue = slices.DeleteFunc(m.queue, func(other *allocation) bool { return other == a })
	a.attempts++
	a.claim = &hearthv1.Claim{Id: claimID(a.id, a.attempts), Epoch: m.epoch, Deadline: timestamppb.New(a.deadline)}
	a.chosen, a.inst, i.by, i.claimedIn = now, i, a, i.session
	a.thaws = i.state == hearthv1.State_STATE_FROZEN
	m.place(i)
	n.began = now
	req := &hearthv1.ActivateRequest{InstanceId: i.id, Claim: a.claim, Revision: m.complete(f)}
	atOnce, came := now.Equal(a.begun) && !a.came.IsZero(), a.came
	m.call(n, func(ctx context.Context) {
		if atOnce {
			m.metrics.decideTime.Observe(time.Since(came).Seconds())
		}
		ctx, cancel := context.WithDeadline(ctx, a.deadline.Add(outcomeSlack))
		defer cancel()
		res, err := n.client.Activate(ctx, req)
		m.fact(func(now time.Time) { m.activated(now, n, a, i, req, res, err) })
	})
}
