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

// createTime bounds the making of one sandbox.
const createTime = time.Minute

// CreateInstance implements NodeService.
func (e *Engine) CreateInstance(ctx context.Context, req *connect.Request[hearthv1.CreateInstanceRequest]) (
	*connect.Response[hearthv1.CreateInstanceResponse], error,
) {
	p, err := e.create(ctx, req.Msg)
	if err != nil {
		return nil, connectError(err)
	}
	return connect.NewResponse(&hearthv1.CreateInstanceResponse{Instance: p}), nil
}

func (e *Engine) create(ctx context.Context, req *hearthv1.CreateInstanceRequest) (*hearthv1.Instance, error) {
	id := req.Id
	if err := checkInstanceID(id); err != nil {
		return nil, err
	}
	rt, err := checkDegree(req.Degree, req.Runtime)
	if err != nil {
		return nil, err
	}
	if err := e.checkWorker(req); err != nil {
		return nil, err
	}
	if err := e.open(); err != nil {
		return nil, err
	}
	i, known, err := e.enter(id, req.Pod, owner{tenant: req.Tenant, group: req.Group})
	if err != nil {
		return nil, err
	}
	if !known {
		e.beginCreation(i, rt)
	}
	return e.awaitWarm(ctx, i)
}

// awaitWarm waits until an Instance is made, and describes it.
func (e *Engine) awaitWarm(ctx context.Context, i *instance) (*hearthv1.Instance, error) {
	select {
	case <-i.warm:
	case <-ctx.Done():
		return nil, fmt.Errorf("create instance %s: %w", i.id, ctx.Err())
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.failure != nil {
		return nil, i.failure
	}
	if i.state >= hearthv1.State_STATE_DRAINING {
		return nil, fmt.Errorf("instance %s is being discarded: %w", i.id, errdefs.ErrFailedPrecondition)
	}
	return i.proto(e.cfg.Node), nil
}

// beginCreation has the engine make the sandbox of an Instance that is in the map already, and boot a Runtime in it, unless nil.
func (e *Engine) beginCreation(i *instance, rt *hearthv1.Runtime) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.boots = rt
	e.advance(i, hearthv1.State_STATE_CREATING)
	within := createTime
	if rt != nil {
		within += pullTime + e.cfg.RuntimeBootTimeout
	}
	begun := e.begin(i, time.Now().Add(within), func(ctx context.Context) {
		s, l, err := e.makeSandbox(ctx, i)
		if err == nil && rt != nil {
			i.mu.Lock()
			i.sandbox, i.launcher = s, l
			i.mu.Unlock()
			err = e.bootWarm(ctx, i, rt)
		}
		e.endCreation(i, s, l, err)
	})
	if !begun {
		i.failure = errStopping
		close(i.warm)
	}
}

// begin has the engine work at an Instance until deadline. A discard ends the work's context and waits until f has returned.
// i.mu must be held: f is called when it is free.
func (e *Engine) begin(i *instance, deadline time.Time, f func(context.Context)) bool {
	done := make(chan struct{})
	i.work = work{done: done}
	begun := e.spawn(func(base context.Context) {
		ctx, cancel := context.WithDeadline(base, deadline)
		defer cancel()
		defer close(done)
		i.mu.Lock()
		i.work.cancel = cancel
		ended := i.ending
		i.mu.Unlock()
		if ended {
			cancel()
		}
		f(ctx)
	})
	if !begun {
		i.work = work{}
	}
	return begun
}

// makeSandbox makes a sandbox, or takes that of a worker's pod, and the containers in it, which wait for a Function.
func (e *Engine) makeSandbox(ctx context.Context, i *instance) (sandbox, launcher, error) {
	ctx, cancel := context.WithTimeout(ctx, createTime)
	defer cancel()
	id := i.id
	if err := e.backend.Ready(ctx); err != nil { // a half-made sandbox is the most that a call to a broken containerd could give
		return sandbox{}, nil, err
	}
	s, err := i.pod.sandbox(), error(nil)
	if !i.worker() {
		s, err = e.backend.RunSandbox(ctx, id)
	}
	if err != nil {
		return sandbox{}, nil, err
	}
	e.cgroups.learnt.learn(i.pod.id, s.Holder.Group)
	i.mu.Lock()
	i.sandbox = s // from here on its end is ours
	i.mu.Unlock()
	if err := e.writeFiles(i, s); err != nil {
		return s, nil, err
	}
	c := e.container(id)
	c.Output = e.outputTo(e.outputOf(id), s.Holder)
	c.Sandbox, c.Labels = s, e.placeLabels(i, map[string]string{labelNode: e.cfg.Node, labelInstance: id})
	if c.Spec, err = e.spec(ctx, i, s); err != nil {
		return s, nil, err
	}
	var l launcher
	err = e.besideSidecar(ctx, i, s, func(ctx context.Context) (err error) {
		l, err = e.backend.CreateTask(ctx, c)
		return err
	})
	return s, l, err
}

// container names an Instance's container and where the launcher's files are.
func (e *Engine) container(id string) container {
	return container{ID: containerID(id), Control: e.controlOf(id)}
}

func (e *Engine) endCreation(i *instance, s sandbox, l launcher, err error) {
	i.mu.Lock()
	i.sandbox, i.launcher = s, l
	if l != nil {
		i.pid = l.Pid()
	}
	if err == nil && i.state == hearthv1.State_STATE_CREATING {
		if !s.Created.IsZero() && !i.worker() {
			i.created = s.Created
		}
		i.pod.made(s)
		e.advance(i, hearthv1.State_STATE_WARM)
	}
	if err != nil && i.failure == nil {
		if errors.Is(err, context.Canceled) {
			err = fmt.Errorf("creation was ended: %w", errdefs.ErrUnavailable)
		}
		i.failure = fmt.Errorf("create instance %s: %w", i.id, err)
		e.log.Warn("instance not created", "instance", i.id, "error", err)
	}
	close(i.warm)
	pid := i.pid
	i.mu.Unlock()
	if err != nil {
		e.end(i, hearthv1.State_STATE_DRAINING, 0)
		return
	}
	e.watchProcess(i, pid)
}
