package pool

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// activated takes in the outcome of a claim.
func (m *Manager) activated(now time.Time, n *node, a *allocation, i *instance, req *hearthv1.ActivateRequest,
	res *hearthv1.ActivateResponse, err error) {
	defer m.place(i)
	n.ended = now
	i.by, a.inst = nil, nil
	m.place(i)
	if err == nil && res.GetInstance().GetId() != i.id {
		err = connect.NewError(connect.CodeUnknown, fmt.Errorf("node %s answered for instance %q", n.name, res.GetInstance().GetId()))
	}
	if err == nil {
		m.answered(now, n, a, i, req, res)
		return
	}
	m.metrics.claims.WithLabelValues(connect.CodeOf(err).String()).Inc()
	m.log.Debug("claim", "instance", i.id, "claim", req.GetClaim().GetId(), "err", err)
	if i.state == hearthv1.State_STATE_SERVING && i.claim.GetId() == req.GetClaim().GetId() && m.functions[a.function] != nil && !i.leaving() {
		m.succeed(now, a, i, nil) // only the answer was lost
		return
	}
	m.refusedBy(now, n, a, i, req, err)
}

// refusedBy takes in that a claim gave no Instance, or that nobody knows whether it did.
func (m *Manager) refusedBy(now time.Time, n *node, a *allocation, i *instance, req *hearthv1.ActivateRequest, err error) {
	switch connect.CodeOf(err) {
	case connect.CodeFailedPrecondition:
		i.refused, i.until = true, now.Add(refusedTime)
		m.again(now, a, err)
	case connect.CodeNotFound:
		if i.state != hearthv1.State_STATE_GONE {
			m.remove(now, i)
		}
		m.again(now, a, err)
	case connect.CodeUnavailable, connect.CodeCanceled, connect.CodeAborted, connect.CodeResourceExhausted:
		m.unknown(a, i, req)
		m.again(now, a, err)
		// The stream may tell within moments that the claim took effect; if it has, that is what to wait for.
		switch {
		case i.state == hearthv1.State_STATE_CLAIMED && i.claim.GetId() == req.GetClaim().GetId() && n.synced && now.Before(i.until):
			a.next = a.deadline
		case a.next.Before(now.Add(retryFirst)):
			a.next = now.Add(retryFirst)
		}
	case connect.CodeDeadlineExceeded:
		m.startDiscard(now, i)
		m.finish(now, a, nil, connect.NewError(connect.CodeDeadlineExceeded, fmt.Errorf("function %s: %s", a.function, message(err))))
	default:
		m.startDiscard(now, i)
		if a.thaws {
			m.again(now, a, err) // that one did not wake up; it says nothing of the Function
			return
		}
		m.failed(now, a, err)
	}
}

// answered takes in a node's Serving.
func (m *Manager) answered(now time.Time, n *node, a *allocation, i *instance, req *hearthv1.ActivateRequest, res *hearthv1.ActivateResponse) {
	m.metrics.claims.WithLabelValues("ok").Inc()
	if f := m.functions[a.function]; f != nil {
		f.failures, f.lastErr = 0, ""
	}
	if i.state != hearthv1.State_STATE_GONE {
		// Under the session that it has: a stream must still tell of it.
		m.observe(now, n, i.session, res.GetInstance())
	}
	if i.routable() && i.claim.GetId() == req.GetClaim().GetId() {
		m.succeed(now, a, i, res.GetPhases())
		return
	}
	m.again(now, a, connect.NewError(connect.CodeAborted, fmt.Errorf("instance %s was given up while it started", i.id)))
}

// unknown marks an Instance of which nobody here knows whether the claim took effect. It is not chosen again before its node has
// said what it is; if nothing comes of it, it ends a little after the claim's deadline. If a stream that began after the claim has said
// already that it is free, then nobody knows better: should the claim take effect all the same, the node refuses the next.
func (m *Manager) unknown(a *allocation, i *instance, req *hearthv1.ActivateRequest) {
	if i.session > i.claimedIn || i.state != hearthv1.State_STATE_FROZEN && i.state >= hearthv1.State_STATE_CLAIMED {
		return
	}
	i.limbo, i.until = true, a.deadline.Add(outcomeSlack)
	i.claim, i.function, i.revision = req.GetClaim(), a.function, req.GetRevision().GetName()
}

// again puts an allocation back to the head of the queue, for a new claim.
func (m *Manager) again(now time.Time, a *allocation, err error) {
	f := m.functions[a.function]
	switch {
	case a.finished():
		return
	case f == nil || f.deleting:
		m.finish(now, a, nil, noFunction(a.function))
		return
	}
	a.lastErr = err
	if a.attempts > freeTries {
		a.next = now.Add(backoff(a.attempts-freeTries, retryFirst, retryMost))
	}
	m.queue = slices.Insert(m.queue, 0, a)
}

// failed takes in that a Function did not start, which another Instance would not change.
func (m *Manager) failed(now time.Time, a *allocation, err error) {
	code := connect.CodeInternal
	if connect.CodeOf(err) == connect.CodeInvalidArgument {
		code = connect.CodeInvalidArgument
	}
	m.finish(now, a, nil, connect.NewError(code, fmt.Errorf("function %s: %s", a.function, message(err))))
	f := m.functions[a.function]
	if f == nil {
		return
	}
	f.failures++
	f.lastErr = message(err)
	m.log.Warn("function did not start", "function", f.name, "failures", f.failures, "err", f.lastErr)
	if f.failures < maxFailures {
		return
	}
	f.retry = now.Add(backoff(f.failures-maxFailures+1, restFirst, restMost))
	for _, other := range slices.Clone(m.queue) {
		if other.function == f.name {
			m.finish(now, other, nil, f.resting(now))
		}
	}
}

// succeed answers an allocation with an Instance that serves.
func (m *Manager) succeed(now time.Time, a *allocation, i *instance, phases []*hearthv1.Phase) {
	m.finish(now, a, &hearthv1.AllocateResponse{Instance: i.message(), Phases: a.phases(phases)}, nil)
}

// phases are how long it took to get a sandbox, from the pool or a new one, and what the node did after that.
func (a *allocation) phases(node []*hearthv1.Phase) []*hearthv1.Phase {
	if a.chosen.IsZero() {
		return node
	}
	waited := a.chosen.Sub(a.begun)
	out := []*hearthv1.Phase{{Name: "sandbox", Offset: durationpb.New(0), Duration: durationpb.New(waited)}}
	for _, p := range node {
		out = append(out, &hearthv1.Phase{Name: p.GetName(), Offset: durationpb.New(waited + p.GetOffset().AsDuration()),
			Duration: p.GetDuration(), Busy: p.GetBusy()})
	}
	return out
}

// finish ends an allocation once.
func (m *Manager) finish(now time.Time, a *allocation, res *hearthv1.AllocateResponse, err error) {
	if a.finished() {
		return
	}
	a.response, a.err, a.ended = res, err, now
	close(a.done)
	m.queue = slices.DeleteFunc(m.queue, func(other *allocation) bool { return other == a })
	if delete(m.unfinished[a.function], a); len(m.unfinished[a.function]) == 0 {
		delete(m.unfinished, a.function)
	}
	m.miss(a.function)
	if err == nil {
		m.succeeded = append(m.succeeded, a)
	} else {
		m.forgetFailed(a)
	}
	result := "ok"
	if err != nil {
		result = connect.CodeOf(err).String()
		if a.internal {
			m.log.Debug("start an instance", "function", a.function, "err", err)
		}
	}
	m.metrics.allocations.WithLabelValues(result).Inc()
	if err == nil {
		m.metrics.allocateTime.Observe(now.Sub(a.begun).Seconds())
	}
}

// expireAllocations ends what waited too long, and forgets what ended long ago.
func (m *Manager) expireAllocations(now time.Time) {
	for _, a := range slices.Clone(m.queue) {
		if now.Before(a.deadline) {
			m.at(a.deadline)
			continue
		}
		m.finish(now, a, nil, m.late(a))
	}
	for len(m.succeeded) > 0 {
		a := m.succeeded[0]
		if end := a.ended.Add(remember); now.Before(end) {
			m.at(end)
			break
		}
		if m.allocations[a.id] == a {
			delete(m.allocations, a.id)
		}
		m.succeeded = m.succeeded[1:]
	}
}

// forgetFailed forgets an allocation that failed once nobody waits for it: the same id may try again.
func (m *Manager) forgetFailed(a *allocation) {
	if a.err != nil && a.callers == 0 && m.allocations[a.id] == a {
		delete(m.allocations, a.id)
	}
}

// late says why an allocation got no Instance in time.
func (m *Manager) late(a *allocation) error {
	if m.up == 0 {
		return unavailable(fmt.Errorf("function %s: %w", a.function, errNoNode))
	}
	if a.lastErr != nil {
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("function %s: no instance after %d attempts, last: %s",
			a.function, a.attempts, message(a.lastErr)))
	}
	err := errors.New("the pool is empty and did not grow in time")
	k := m.kindFor(a.function)
	if k.runtime != "" {
		err = fmt.Errorf("no instance of runtime %s was free or could be booted in time", k.runtime)
	}
	for _, why := range m.supplyErrors(k.runtime) {
		err = fmt.Errorf("%w: %s", err, why)
	}
	return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("function %s: %w", a.function, err))
}
