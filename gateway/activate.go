package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	minRetry = 50 * time.Millisecond // between rounds of activations of a Function whose last failed
	maxRetry = 5 * time.Second
)

// inbox collects what wants looking at, each once; one goroutine takes it out and starts what has to be done.
type inbox[T comparable] struct {
	mu     sync.Mutex // guards due
	due    map[T]struct{}
	signal chan struct{} // holds one
}

func newInbox[T comparable]() *inbox[T] {
	return &inbox[T]{due: map[T]struct{}{}, signal: make(chan struct{}, 1)}
}

func (b *inbox[T]) put(one T) {
	b.mu.Lock()
	b.due[one] = struct{}{}
	b.mu.Unlock()
	signal(b.signal)
}

func (b *inbox[T]) take() map[T]struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	due := b.due
	b.due = map[T]struct{}{}
	return due
}

// run has handle start work with begin until ctx is done, then waits for what is under way, which ends with ctx.
func (b *inbox[T]) run(ctx context.Context, handle func(one T, begin func(func()))) {
	var work sync.WaitGroup
	defer work.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.signal:
		}
		for one := range b.take() {
			handle(one, work.Go)
		}
	}
}

// dispatch starts the activations that a function's queue needs.
func (g *Gateway) dispatch(ctx context.Context) {
	g.dispatcher.run(ctx, func(f *function, begin func(func())) {
		for range f.begin(time.Now()) {
			begin(func() { g.activate(ctx, f) })
		}
	})
}

// begin says how many activations the queue needs now, and counts them as in flight: one for as many waiters as an Instance
// serves at once, less those under way, within the Function's maximum. After a failure one at a time tries, not before its time.
func (f *function) begin(now time.Time) int {
	f.mu.Lock()
	defer f.unlock()
	f.pump(now)
	waiting := f.waiting.Len()
	if waiting == 0 || f.deleted {
		return 0
	}
	f.setAlarm(now)
	want := (waiting+f.limits.concurrency-1)/f.limits.concurrency - f.starting
	if f.failures > 0 {
		want = min(want, 1-f.starting)
		if now.Before(f.retryAt) {
			return 0
		}
	}
	n := max(0, min(want, f.limits.max-f.lives(now)-f.starting))
	f.starting += n
	return n
}

// setAlarm has the queue looked at again when waiting alone changes something: a retry is due, or an endpoint is to be
// tried again.
func (f *function) setAlarm(now time.Time) {
	var at time.Time
	consider := func(t time.Time) {
		if t.After(now) && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	if f.failures > 0 {
		consider(f.retryAt)
	}
	for _, e := range f.endpoints {
		consider(e.downUntil)
	}
	switch {
	case at.IsZero():
	case f.alarm == nil:
		f.alarm = time.AfterFunc(at.Sub(now), func() { f.wake(f) })
	default:
		f.alarm.Reset(at.Sub(now))
	}
}

// started takes in the reply of an activation: the Instance gets requests at once, before any Watch event tells of it.
func (f *function) started(in *hearthv1.Instance, s *start) {
	f.mu.Lock()
	defer f.unlock()
	now := s.ended
	f.starting--
	f.failures, f.retryAt = 0, time.Time{}
	if e := f.endpoint(keyOf(in)); e != nil {
		e.explain(s)
	} else if !f.deleted && !f.gone.has(keyOf(in)) {
		e = newEndpoint(in, f.config)
		e.explain(s)
		e.trustUntil = now.Add(trustTime)
		f.endpoints = append(f.endpoints, e)
	}
	f.pump(now)
	if f.waiting.Len() > 0 {
		f.wake(f)
	}
}

// startFailed takes in that an activation gave no Instance. Those who wait go on waiting while there is anything to wait
// for: another activation, a slot of an Instance that serves, or word of one that is out of rotation and fills the maximum.
func (f *function) startFailed(why *refusal, now time.Time) {
	f.mu.Lock()
	defer f.unlock()
	f.starting--
	if !now.Before(f.retryAt) { // those of one round count once
		f.failures++
		backoff := min(minRetry<<min(f.failures-1, 10), maxRetry)
		f.retryAt = now.Add(backoff/2 + mathrand.N(backoff/2))
	}
	if why.retryAfter > 0 {
		why.retryAfter = max(why.retryAfter, f.retryAt.Sub(now))
	}
	f.full = why.code == codeNoCapacity && f.ailing(now)
	if f.starting == 0 && f.lives(now) == 0 && !f.full {
		f.refuseAll(why, now)
	}
	if f.waiting.Len() > 0 {
		f.wake(f)
	}
}

// ailing says whether an endpoint is out of rotation that poolmanager still counts: its node may have vanished, of which poolmanager
// will hear as well.
func (f *function) ailing(now time.Time) bool {
	return slices.ContainsFunc(f.endpoints, func(e *endpoint) bool {
		return now.Before(e.downUntil) && !e.draining && !e.distrusted(now)
	})
}

// roomMade has the next activation asked for at once if there was no room for it before.
func (f *function) roomMade() {
	if f.full {
		f.full, f.failures, f.retryAt = false, 0, time.Time{}
	}
}

// activate is one activation from call to consequence.
func (g *Gateway) activate(ctx context.Context, f *function) {
	ctx, cancel := context.WithTimeout(ctx, max(g.config.ActivationTime, f.timeout()))
	defer cancel()
	begun := time.Now()
	res, err := g.allocate(ctx, f.name)
	ended := time.Now()
	f.metrics.activation(ended.Sub(begun), err)
	if err != nil {
		g.config.Logger.Info("activation failed", "function", f.name, "duration", ended.Sub(begun), "err", err)
		f.startFailed(allocationRefusal(f.name, err), ended)
		return
	}
	in := res.GetInstance()
	g.config.Logger.Debug("activated", "function", f.name, "instance", in.GetId(), "duration", ended.Sub(begun))
	f.started(in, &start{begun: begun, ended: ended, phases: phasesOf(res.GetPhases())})
}

// allocate asks until there is an answer other than "unavailable", within the configured patience. Each time with the same
// id: what the first call may have begun is then what the second finds.
func (g *Gateway) allocate(ctx context.Context, name string) (*hearthv1.AllocateResponse, error) {
	req := &hearthv1.AllocateRequest{Function: name, Id: rand.Text()}
	if deadline, ok := ctx.Deadline(); ok {
		req.Deadline = timestamppb.New(deadline)
	}
	giveUp := time.Now().Add(g.config.Patience)
	for pause := minRetry; ; pause = min(2*pause, time.Second/2) {
		res, err := g.config.Pool.Allocate(ctx, req)
		if err == nil {
			if in := res.GetInstance(); in.GetId() == "" || !validAddress(in.GetAddress()) {
				return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("poolmanager named instance %q at address %q", in.GetId(), in.GetAddress()))
			}
			return res, nil
		}
		wait := pause/2 + mathrand.N(pause/2)
		if connect.CodeOf(err) != connect.CodeUnavailable || time.Now().Add(wait).After(giveUp) {
			return nil, err
		}
		if !sleep(ctx, wait) {
			return nil, err
		}
	}
}

// sleep waits, and says whether ctx let it.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// allocationRefusal says to clients why there is no Instance for them.
func allocationRefusal(name string, err error) *refusal {
	message := err.Error()
	if e := new(connect.Error); errors.As(err, &e) {
		message = e.Message()
	}
	switch connect.CodeOf(err) {
	case connect.CodeNotFound:
		return unknownFunction(name)
	case connect.CodeResourceExhausted:
		return noInstance(codeNoCapacity, name, message, "try again; raise the function's max, or give the pool more instances", time.Second)
	case connect.CodeInternal, connect.CodeInvalidArgument, connect.CodeFailedPrecondition:
		return noInstance("start_failed", name, message, "see `hearth logs "+name+"`: the function itself may be at fault", time.Second)
	case connect.CodeDeadlineExceeded:
		return noInstance("start_too_slow", name, "no instance came up in time: "+message, "see `hearth start --trace "+name+"` for where the time goes", time.Second)
	default:
		return noInstance("pool_unavailable", name, message, "try again; if it lasts, look at poolmanager and nodeagent with `hearth status`", time.Second)
	}
}
