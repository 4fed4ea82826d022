package instance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
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
	if i.state != hearthv1.State_STATE_WARM || i.ending {
		return nil, fmt.Errorf("instance %s is %s, not warm: %w", i.id, stateName(i.state), errdefs.ErrFailedPrecondition)
	}
	if err := i.fits(a.revision); err != nil {
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
	i.claim, i.revision, i.image, i.start = a.claim, a.revision, a.image, a
	e.advance(i, hearthv1.State_STATE_CLAIMED)
	begun := e.begin(i, a.deadline, func(ctx context.Context) { e.endActivation(i, a, e.startFunction(ctx, i, a)) })
	if !begun {
		a.err = errStopping
		close(a.done)
	}
	return a, nil
}

// endActivation publishes how an activation ended, and has the Instance discarded if it did not end well.
func (e *Engine) endActivation(i *instance, a *activation, err error) {
	i.mu.Lock()
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
	close(a.done)
	if err != nil {
		e.end(i, hearthv1.State_STATE_DRAINING, 0)
		return
	}
	e.afterServing(i, a)
}

// afterDelay leaves the cores to the answer and to the Function's first request.
const afterDelay = 25 * time.Millisecond

// afterServing is what can wait until the answer is on its way.
func (e *Engine) afterServing(i *instance, a *activation) {
	e.spawn(func(ctx context.Context) {
		if !sleep(ctx, afterDelay) {
			return
		}
		ctx, cancel := context.WithTimeout(ctx, createTime)
		defer cancel()
		for delay := 100 * time.Millisecond; ; delay = min(2*delay, 5*time.Second) {
			err := absent(e.record(ctx, i, a))
			if err == nil {
				break
			}
			e.log.Warn("what the instance has become is not recorded", "instance", i.id, "error", err)
			if !sleep(ctx, delay) {
				return
			}
		}
		e.limitCPU(i.id, a.revision.GetResources().GetCpuMillis())
		e.started(i)
	})
	e.checkLoader(i)
	e.metrics.prepared.Set(float64(e.shelf.count()))
}

// started tells who wants to know what a start needs.
func (e *Engine) started(i *instance) {
	i.mu.Lock()
	image, launcher := i.chainID, i.launcher
	if i.booted != nil { // what it needed of its image was in memory before
		launcher = nil
	}
	i.mu.Unlock()
	if e.cfg.Prefetch != nil && launcher != nil {
		e.cfg.Prefetch.Started(digest.Digest(image), launcher.Pid())
	}
}

// record has containerd know what an Instance serves. Until then a restarted engine would discard it: a claim that its caller has
// seen served for less than a moment is made again.
func (e *Engine) record(ctx context.Context, i *instance, a *activation) error {
	i.mu.Lock()
	box, r := i.sandbox, record{ID: containerID(i.id), Image: i.image, Snapshot: i.snapshot, Labels: i.labels(e.cfg.Node)}
	i.mu.Unlock()
	if a.process != nil {
		var err error
		if r.Spec, err = e.spec(ctx, i.id, box); err != nil {
			return err
		}
		become(r.Spec.Process, a.process)
	}
	return e.backend.Record(ctx, r)
}

func (e *Engine) limitCPU(id string, millis int64) {
	if millis == 0 {
		return
	}
	if err := e.cgroups.limitCPU(id, millis); err != nil {
		e.log.Error("cpu limit not set", "instance", id, "error", err)
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
