package instance

import (
	"context"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// maxGrace is the longest that a Function may take to end by itself.
	maxGrace = 10 * time.Minute
	// removeTime bounds one attempt to remove an Instance, the grace not counted.
	removeTime = time.Minute
)

// Discard implements NodeService.
func (e *Engine) Discard(ctx context.Context, req *connect.Request[hearthv1.DiscardRequest]) (
	*connect.Response[hearthv1.DiscardResponse], error,
) {
	if err := e.discard(ctx, req.Msg); err != nil {
		return nil, connectError(err)
	}
	return connect.NewResponse(&hearthv1.DiscardResponse{}), nil
}

func (e *Engine) discard(ctx context.Context, req *hearthv1.DiscardRequest) error {
	if err := checkInstanceID(req.InstanceId); err != nil {
		return err
	}
	grace := e.cfg.Grace
	if req.Grace != nil {
		grace = req.Grace.AsDuration()
	}
	if grace < 0 || grace > maxGrace || req.Epoch < 0 {
		return invalid("grace %s is not between 0 and %s, or epoch %d is negative", grace, maxGrace, req.Epoch)
	}
	if err := e.open(); err != nil {
		return err
	}
	if err := e.admit(req.Epoch); err != nil {
		return err
	}
	i, ok := e.lookup(req.InstanceId)
	if !ok {
		return nil
	}
	e.end(i, hearthv1.State_STATE_DRAINING, grace)
	ctx, cancel := context.WithTimeout(ctx, grace+2*removeTime) // the removal itself goes on until it has succeeded
	defer cancel()
	select {
	case <-i.done:
		return nil
	case <-e.stopped:
		return errStopping
	case <-ctx.Done():
		return fmt.Errorf("discard instance %s: %w", i.id, ctx.Err())
	}
}

// end begins to discard an Instance: to is Draining when it is wanted so, Gone when it has ended by itself. Only one in which a
// Function is, serving or frozen, gets grace. It does not wait; calling it again is harmless.
func (e *Engine) end(i *instance, to hearthv1.State, grace time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	e.endLocked(i, to, grace)
}

// endLocked is end for who holds i.mu.
func (e *Engine) endLocked(i *instance, to hearthv1.State, grace time.Duration) {
	if i.state != hearthv1.State_STATE_SERVING && i.state != hearthv1.State_STATE_FROZEN || to == hearthv1.State_STATE_GONE {
		grace = 0
	}
	e.advance(i, to)
	if i.ending {
		return
	}
	i.ending = true
	if i.work.cancel != nil {
		i.work.cancel()
	}
	e.spawn(func(ctx context.Context) { e.tearDown(ctx, i, grace) }) // or the next engine does it
}

// tearDown waits for what is under way at an Instance, then removes it, until that has succeeded or the engine stops.
func (e *Engine) tearDown(ctx context.Context, i *instance, grace time.Duration) {
	i.mu.Lock()
	under := i.work.done
	i.mu.Unlock()
	if under != nil {
		<-under // its context has ended
	}
	for delay := 200 * time.Millisecond; ; delay = min(2*delay, 5*time.Second) {
		err := e.remove(ctx, i, grace)
		if err == nil {
			break
		}
		e.log.Warn("instance not removed yet", "instance", i.id, "error", err)
		if !sleep(ctx, delay) {
			return
		}
		grace = 0
	}
	i.mu.Lock()
	e.advance(i, hearthv1.State_STATE_GONE)
	functions := []string{i.revision.GetFunction()}
	if i.booted != nil {
		functions = append(functions, runtimeLog(i.booted.name))
	}
	i.mu.Unlock()
	e.drop(i)
	close(i.done)
	for _, function := range functions {
		if err := e.logs.prune(function, e.live); err != nil {
			e.log.Warn("old logs not removed", "function", function, "error", err)
		}
	}
}

// remove removes all of an Instance from containerd and disk. Each step is harmless when it was done before.
func (e *Engine) remove(ctx context.Context, i *instance, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, removeTime+grace)
	defer cancel()
	i.mu.Lock()
	box, snapshot := i.sandbox.ID, i.snapshot
	i.mu.Unlock()
	if err := e.cgroups.thaw(i.place()); err != nil { // a frozen process takes no signal, and answers nothing
		return err
	}
	grace = e.drain(ctx, i, grace)
	i.letGo()
	if err := i.hide(); err != nil { // it is gone when the kubelet removes the pod
		e.log.Warn("function's files still shown in its pod", "instance", i.id, "error", err)
	}
	if err := e.backend.StopTask(ctx, containerID(i.id), e.cgroups.function(i.place()), grace); err != nil {
		return err
	}
	if e.hasSidecar(i.id) {
		if err := e.backend.StopTask(ctx, sidecarID(i.id), e.cgroups.sidecar(i.id), 0); err != nil {
			return err
		}
	}
	if snapshot != "" {
		if err := e.backend.RemoveSnapshot(ctx, snapshot); err != nil {
			return err
		}
		e.shelf.release(snapshot)
	}
	e.releaseCode(ctx, i)
	if err := e.leavePod(ctx, i, box); err != nil {
		return err
	}
	return os.RemoveAll(e.filesOf(i.id))
}

// leavePod removes an Instance's cgroup, and its sandbox if nobody else is in that.
func (e *Engine) leavePod(ctx context.Context, i *instance, box string) error {
	if !i.pod.leave(i.id) {
		return e.cgroups.remove(ctx, e.cgroups.function(i.place()))
	}
	return e.removeSandboxes(ctx, i.pod.id, box)
}

// removeSandboxes removes the sandbox of a pod; if its id is not known, because its creation's answer never came or
// because a former engine made it, all that bear the pod's label.
func (e *Engine) removeSandboxes(ctx context.Context, pod, box string) error {
	ids := []string{box}
	if box == "" {
		all, err := e.backend.Sandboxes(ctx)
		if err != nil {
			return err
		}
		for _, s := range all {
			if s.Pod == pod {
				ids = append(ids, s.ID)
			}
		}
	}
	for _, id := range ids[1:] {
		if err := e.backend.RemoveSandbox(ctx, id, pod); err != nil {
			return err
		}
	}
	return e.backend.RemoveSandbox(ctx, ids[0], pod)
}

// live tells whether an Instance is there, so that its log is kept.
func (e *Engine) live(id string) bool {
	_, ok := e.lookup(id)
	return ok
}
