package instance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// maxClaimTime bounds a claim whatever its deadline says.
const maxClaimTime = 15 * time.Minute

const (
	outcomeServing  = "serving"
	outcomeDeadline = "deadline"
	outcomeFailed   = "failed"
	outcomeStopped  = "stopped" // the Instance was discarded, or the engine stopped, meanwhile
)

// activation is the one attempt to start a Revision in an Instance.
type activation struct {
	claim    *hearthv1.Claim
	revision *hearthv1.Revision
	image    string // normalized reference; of the Runtime, if there is one
	code     string // normalized reference of its package
	runtime  *hearthv1.Runtime
	secrets  map[string][]byte // until they are where they belong
	deadline time.Time
	trace    *trace
	process  *specs.Process // once known; nil if it is what the Instance had before
	thaw     bool           // of a Frozen Instance
	done     chan struct{}  // closed when what follows is final
	err      error
	answer   *hearthv1.Instance
}

// Activate implements NodeService.
func (e *Engine) Activate(ctx context.Context, req *connect.Request[hearthv1.ActivateRequest]) (
	*connect.Response[hearthv1.ActivateResponse], error,
) {
	answer, err := e.activate(ctx, req.Msg)
	if err != nil {
		return nil, connectError(err)
	}
	return connect.NewResponse(answer), nil
}

func (e *Engine) activate(ctx context.Context, req *hearthv1.ActivateRequest) (*hearthv1.ActivateResponse, error) {
	a := &activation{
		claim: req.Claim, revision: req.Revision, trace: newTrace(time.Now()), done: make(chan struct{}),
	}
	if err := checkInstanceID(req.InstanceId); err != nil {
		return nil, err
	}
	if err := checkClaim(req.Claim); err != nil {
		return nil, err
	}
	var err error
	if a.image, a.code, err = checkRevision(req.Revision); err != nil {
		return nil, err
	}
	if err := e.mayShare(req.Revision.Group); err != nil {
		return nil, err
	}
	a.runtime, a.secrets = runtimeOf(req.Revision, a.image), secretsOf(req.Revision)
	if err := e.open(); err != nil {
		return nil, err
	}
	if err := e.admit(req.Claim.Epoch); err != nil {
		return nil, err
	}
	i, ok := e.lookup(req.InstanceId)
	if !ok {
		return nil, fmt.Errorf("instance %s: %w", req.InstanceId, errdefs.ErrNotFound)
	}
	if a, err = e.claim(i, a); err != nil {
		return nil, err
	}
	select {
	case <-a.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("activate instance %s: %w", i.id, ctx.Err())
	}
	if a.err != nil {
		return nil, a.err
	}
	return &hearthv1.ActivateResponse{Instance: a.answer, Phases: a.trace.phases()}, nil
}

// claim is the linearisation point: under the Instance's lock it becomes this claim's, or it was this claim's already, and then
// the answer is the activation under way or ended. Otherwise it is refused.
func (e *Engine) claim(i *instance, a *activation) (*activation, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.start != nil && i.start.claim.Id == a.claim.Id {
		return i.start, nil
	}
	start, err := e.starter(i, a)
	if err != nil {
		return nil, err
	}
	begin := a.trace.begin
	a.deadline = begin.Add(e.cfg.DefaultClaimTimeout)
	if a.claim.Deadline != nil {
		a.deadline = a.claim.Deadline.AsTime()
	}
	if latest := begin.Add(maxClaimTime); a.deadline.After(latest) {
		a.deadline = latest
	}
	if !a.deadline.After(begin) {
		return nil, fmt.Errorf("claim %s was over before it came: %w", a.claim.Id, context.DeadlineExceeded)
	}
	if a.revision = i.placed(a.revision); i.state == hearthv1.State_STATE_WARM {
		if err := i.pod.admit(ownerOf(a.revision, i.id)); err != nil {
			return nil, err
		}
		i.revision, i.image = a.revision, a.image // for ever
	} else {
		a.thaw = true
	}
	i.claim, i.start, i.recorded = a.claim, a, make(chan struct{})
	e.advance(i, hearthv1.State_STATE_CLAIMED)
	e.starts.begin()
	begun := e.begin(i, a.deadline, func(ctx context.Context) { e.endActivation(i, a, start(ctx, i, a)) })
	if !begun {
		e.starts.end()
		a.err = errStopping
		close(a.done)
	}
	return a, nil
}

// starter tells how an Instance is brought to serve a Revision, if it can be: a Warm one by what makes it the Revision's, a Frozen
// one of the same Revision by a thaw. i.mu must be held.
func (e *Engine) starter(i *instance, a *activation) (func(context.Context, *instance, *activation) error, error) {
	switch {
	case i.ending:
		return nil, fmt.Errorf("instance %s is being discarded: %w", i.id, errdefs.ErrFailedPrecondition)
	case i.state == hearthv1.State_STATE_WARM:
		return e.startFunction, i.fits(a.revision)
	case i.state != hearthv1.State_STATE_FROZEN:
		return nil, fmt.Errorf("instance %s is %s, neither warm nor frozen: %w", i.id, stateName(i.state), errdefs.ErrFailedPrecondition)
	case i.revision.GetFunction() != a.revision.Function || i.revision.GetName() != a.revision.Name:
		return nil, fmt.Errorf("instance %s is frozen with revision %s, not %s: %w",
			i.id, i.revision.GetName(), a.revision.Name, errdefs.ErrFailedPrecondition)
	case i.frozen.claim == a.claim.Id: // a call that was under way for long
		return nil, fmt.Errorf("claim %s ended when instance %s was frozen: %w", a.claim.Id, i.id, errdefs.ErrFailedPrecondition)
	}
	return e.thaw, nil
}

// endActivation publishes how an activation ended, and has the Instance discarded if it did not end well.
func (e *Engine) endActivation(i *instance, a *activation, err error) {
	e.starts.end()
	i.mu.Lock()
	select {
	case <-i.exited: // and whoever saw it left it to us
		if err == nil {
			err = fmt.Errorf("the process ended with status %d", i.status)
		}
	default:
	}
	if err == nil && !e.advance(i, hearthv1.State_STATE_SERVING) {
		err = fmt.Errorf("instance %s was discarded meanwhile: %w", i.id, errdefs.ErrUnavailable)
	}
	a.answer = i.proto(e.cfg.Node)
	i.mu.Unlock()
	outcome := outcomeOf(err)
	if err != nil {
		a.err = fmt.Errorf("start %s in instance %s: %w", a.revision.Name, i.id, classify(err))
		e.log.Warn("activation failed", "instance", i.id, "claim", a.claim.Id, "revision", a.revision.Name, "error", err)
	}
	e.metrics.activated(outcome, a.trace.phases())
	if a.thaw {
		e.metrics.thaws.WithLabelValues(outcome).Inc()
	}
	close(a.done)
	if err != nil {
		e.end(i, hearthv1.State_STATE_DRAINING, 0)
		return
	}
	e.afterServing(i, a)
}

// afterDelay leaves the cores to the answer, to the Function's first request and to other starts.
const afterDelay = 25 * time.Millisecond

// recordTime bounds one attempt to have containerd know something.
const recordTime = 10 * time.Second

// afterServing is what can wait until the answer is on its way.
func (e *Engine) afterServing(i *instance, a *activation) {
	i.mu.Lock()
	recorded := i.recorded
	i.mu.Unlock()
	e.spawn(func(ctx context.Context) {
		e.starts.lull(ctx, afterDelay) // if the engine stops meanwhile, there is none to wait for
		if a.thaw {
			e.untilRecorded(ctx, i.id, recorded, func(ctx context.Context) error { return e.recordThaw(ctx, i) })
			return
		}
		if e.untilRecorded(ctx, i.id, recorded, func(ctx context.Context) error { return e.record(ctx, i, a) }) {
			e.limitCPU(i, a.revision.GetResources().GetCpuMillis())
			e.show(i)
		}
	})
	e.checkLoader(i)
	e.metrics.prepared.Set(float64(e.shelf.count()))
}

// untilRecorded tries to have containerd know something until it does, and then closes recorded; it is false if the engine stops
// before, and a last attempt has failed too: the next engine ends an Instance that serves and of which nobody knows. A container that
// has gone needs no record.
func (e *Engine) untilRecorded(ctx context.Context, id string, recorded chan struct{}, write func(context.Context) error) bool {
	for delay := 100 * time.Millisecond; ; delay = min(2*delay, 5*time.Second) {
		last := ctx.Err() != nil
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTime)
		err := absent(write(bounded))
		cancel()
		if err == nil {
			close(recorded)
			return true
		}
		e.log.Warn("what the instance has become is not recorded", "instance", id, "error", err)
		if last {
			return false
		}
		sleep(ctx, delay)
	}
}

// record has containerd know what an Instance serves. Until then a restarted engine would discard it: a claim that its caller has
// seen served for less than a moment is made again.
func (e *Engine) record(ctx context.Context, i *instance, a *activation) error {
	i.mu.Lock()
	box, r := i.sandbox, record{ID: containerID(i.id), Image: i.image, Snapshot: i.snapshot, Labels: e.labels(i)}
	i.mu.Unlock()
	if a.process != nil {
		var err error
		if r.Spec, err = e.spec(ctx, i, box); err != nil {
			return err
		}
		become(r.Spec.Process, a.process)
	}
	return e.backend.Record(ctx, r)
}

func (e *Engine) limitCPU(i *instance, millis int64) {
	if millis == 0 {
		return
	}
	if err := e.cgroups.limitCPU(i.place(), millis); err != nil && !e.cgroups.refusesLimit(err) {
		e.log.Error("cpu limit not set", "instance", i.id, "error", err)
	}
}

func outcomeOf(err error) string {
	switch {
	case err == nil:
		return outcomeServing
	case errors.Is(err, context.DeadlineExceeded):
		return outcomeDeadline
	case errors.Is(err, context.Canceled):
		return outcomeStopped
	}
	return outcomeFailed
}

// classify gives an error that comes from below the kind that Activate promises: what went wrong inside containerd, an image
// that is not there for example, is the start that failed, and not an Instance that is not there.
func classify(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded), errdefs.IsUnavailable(err), errdefs.IsInvalidArgument(err):
		return err
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("the instance was discarded or the node stopped: %w", errdefs.ErrUnavailable)
	}
	return connect.NewError(connect.CodeInternal, err)
}
