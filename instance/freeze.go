package instance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// freezeTime bounds a freeze, containerd's part of it counted.
	freezeTime = 10 * time.Second
	// stopTime is how long processes may take to come to a stop. One that waits in the kernel for a dead disk never does.
	stopTime = 3 * time.Second
)

const (
	outcomeFrozen     = "frozen"
	outcomeUnrecorded = "unrecorded" // containerd could not be told: the Instance serves on
)

// frozen is what is noted of an Instance when it is frozen.
type frozen struct {
	since time.Time
	claim string // that it served until then
	bytes int64  // of memory that it used
	thaws int    // how often it was thawed before
}

// freezing is a freeze under way, or done.
type freezing struct {
	done   chan struct{} // closed when what follows is final
	err    error
	answer *hearthv1.Instance
}

// errUnrecorded says that containerd does not know of a freeze, so that there was none.
var errUnrecorded = fmt.Errorf("containerd cannot be told: %w", errdefs.ErrUnavailable)

// Freeze implements NodeService.
func (e *Engine) Freeze(ctx context.Context, req *connect.Request[hearthv1.FreezeRequest]) (
	*connect.Response[hearthv1.FreezeResponse], error,
) {
	p, err := e.freeze(ctx, req.Msg)
	if err != nil {
		return nil, connectError(err)
	}
	return connect.NewResponse(&hearthv1.FreezeResponse{Instance: p}), nil
}

func (e *Engine) freeze(ctx context.Context, req *hearthv1.FreezeRequest) (*hearthv1.Instance, error) {
	if err := checkInstanceID(req.InstanceId); err != nil {
		return nil, err
	}
	if req.Epoch < 0 {
		return nil, invalid("epoch %d is negative", req.Epoch)
	}
	if err := e.open(); err != nil {
		return nil, err
	}
	if err := e.admit(req.Epoch); err != nil {
		return nil, err
	}
	i, ok := e.lookup(req.InstanceId)
	if !ok {
		return nil, fmt.Errorf("instance %s: %w", req.InstanceId, errdefs.ErrNotFound)
	}
	f, err := e.beginFreeze(i)
	if err != nil {
		return nil, err
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("freeze instance %s: %w", i.id, ctx.Err())
	}
	if f.err != nil {
		return nil, f.err
	}
	if req.Reclaim {
		e.spawn(func(context.Context) { e.cgroups.reclaim(i.place(), f.answer.MemoryBytes) }) // it may take a while, and nobody waits for it
	}
	return f.answer, nil
}

// beginFreeze has the engine freeze an Instance that serves, or finds the freeze that is under way or done.
func (e *Engine) beginFreeze(i *instance) (*freezing, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f := &freezing{done: make(chan struct{})}
	switch {
	case i.freeze != nil:
		return i.freeze, nil
	case i.state == hearthv1.State_STATE_FROZEN && !i.ending:
		f.answer = i.proto(e.cfg.Node)
		close(f.done)
		return f, nil
	case i.state != hearthv1.State_STATE_SERVING || i.ending:
		return nil, fmt.Errorf("instance %s is %s, not serving: %w", i.id, stateName(i.state), errdefs.ErrFailedPrecondition)
	}
	recorded := i.recorded
	begun := e.begin(i, time.Now().Add(freezeTime), func(ctx context.Context) {
		noted, err := e.stopFunction(ctx, i, recorded)
		e.endFreeze(i, f, noted, err)
	})
	if !begun {
		return nil, errStopping
	}
	i.freeze = f
	return f, nil
}

// stopFunction notes with containerd that an Instance is frozen and then freezes it, in this order: whatever is killed in between,
// one that is noted and runs is none that a claim is sure of, and it is discarded. What it serves has to be recorded before.
func (e *Engine) stopFunction(ctx context.Context, i *instance, recorded <-chan struct{}) (frozen, error) {
	noted := frozen{since: time.Now()}
	select {
	case <-recorded:
	case <-ctx.Done():
		return noted, fmt.Errorf("%w: %w", errUnrecorded, ctx.Err())
	}
	if err := e.noteFrozen(ctx, i.id, noted.since); err != nil {
		return noted, fmt.Errorf("%w: %w", errUnrecorded, err)
	}
	var err error
	noted.bytes, err = e.hold(ctx, i)
	return noted, err
}

// noteFrozen has containerd know since when an Instance is frozen.
func (e *Engine) noteFrozen(ctx context.Context, id string, since time.Time) error {
	return e.backend.Label(ctx, containerID(id), map[string]string{labelFrozen: since.Format(time.RFC3339Nano)})
}

// hold stops the processes and says how much memory they keep.
func (e *Engine) hold(ctx context.Context, i *instance) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	if err := e.cgroups.freeze(ctx, i.place()); err != nil {
		return 0, err
	}
	used, err := e.cgroups.memory(i.place())
	if err != nil {
		e.log.Warn("memory of a frozen instance not known", "instance", i.id, "error", err)
	}
	return used, nil
}

// endFreeze publishes how a freeze ended. An Instance that does not freeze is discarded; one of which containerd could not be
// told serves on.
func (e *Engine) endFreeze(i *instance, f *freezing, noted frozen, err error) {
	i.mu.Lock()
	i.freeze = nil
	if err == nil && (i.ending || i.state != hearthv1.State_STATE_SERVING) {
		err = fmt.Errorf("it was discarded meanwhile: %w", context.Canceled)
	}
	if err == nil {
		noted.thaws, noted.claim = i.frozen.thaws, i.claim.GetId()
		i.claim, i.start, i.frozen = nil, nil, noted
		e.advance(i, hearthv1.State_STATE_FROZEN)
		f.answer = i.proto(e.cfg.Node)
	}
	i.mu.Unlock()
	outcome := outcomeOf(err)
	switch {
	case err == nil:
		outcome = outcomeFrozen
	case errors.Is(err, errUnrecorded):
		outcome = outcomeUnrecorded
		e.unfreeze(i)
	default:
		e.end(i, hearthv1.State_STATE_DRAINING, e.cfg.Grace)
	}
	e.metrics.freezes.WithLabelValues(outcome).Inc()
	if err != nil {
		f.err = fmt.Errorf("freeze instance %s: %w", i.id, classify(err))
		e.log.Warn("instance not frozen", "instance", i.id, "error", err)
	}
	close(f.done)
	if err == nil {
		e.evictSurplus()
	}
}

// unfreeze takes a note back that containerd may have got although its answer did not come: an Instance that serves and is noted
// as frozen would not survive a restart.
func (e *Engine) unfreeze(i *instance) {
	i.mu.Lock()
	defer i.mu.Unlock()
	select {
	case <-i.recorded:
	default:
		return // it was not noted yet
	}
	recorded := make(chan struct{})
	i.recorded = recorded
	e.spawn(func(ctx context.Context) {
		e.untilRecorded(ctx, i.id, recorded, func(ctx context.Context) error {
			return e.backend.Label(ctx, containerID(i.id), map[string]string{labelFrozen: ""})
		})
	})
}

// thaw has a frozen Instance serve again: the whole start, then, for what is recorded comes after it.
func (e *Engine) thaw(ctx context.Context, i *instance, a *activation) error {
	begin := time.Now()
	if err := e.serve(ctx, i, a.revision); err != nil {
		return err
	}
	i.mu.Lock()
	b, frozenFor := i.booted, time.Since(i.frozen.since)
	i.frozen.thaws++
	i.mu.Unlock()
	resumed, prompt := func() error { return nil }, false
	if b != nil {
		var err error
		if resumed, prompt, err = b.thawed(ctx, frozenFor); err != nil {
			return err
		}
	}
	if err := e.cgroups.thaw(i.place()); err != nil {
		return err
	}
	a.trace.since(phaseThaw, begin)
	e.metrics.thawSeconds.Observe(time.Since(begin).Seconds())
	if prompt {
		e.spawn(func(context.Context) {
			if err := resumed(); err != nil {
				e.log.Warn("thawed instance is not well", "instance", i.id, "error", err)
			}
		})
		return nil
	}
	begin = time.Now()
	if err := resumed(); err != nil {
		return fmt.Errorf("resume after the thaw: %w", err)
	}
	if b != nil {
		a.trace.since(phaseResume, begin)
	}
	return nil
}

// recordThaw has containerd know whose a thawed Instance is. Until then it is noted as frozen although it runs.
func (e *Engine) recordThaw(ctx context.Context, i *instance) error {
	i.mu.Lock()
	labels := e.labels(i)
	i.mu.Unlock()
	labels[labelFrozen] = ""
	return e.backend.Label(ctx, containerID(i.id), labels)
}
