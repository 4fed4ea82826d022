package instance

import (
	"context"
	"fmt"
	"net/url"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
)

// killTime is how long a process may take to end after SIGKILL. It is stuck in the kernel if it needs longer.
const killTime = 10 * time.Second

// CreateTask implements tasks. The container names the sandbox, so that containerd gives it to the shim that runs already: a
// shim of its own would cost some 30 ms. The rest is one write to containerd's database and one `runc create`.
func (n *node) CreateTask(ctx context.Context, c container) error {
	ctx = n.in(ctx)
	spec, err := typeurl.MarshalAny(c.Spec)
	if err != nil {
		return fmt.Errorf("encode spec of %s: %w", c.ID, err)
	}
	_, err = n.client.ContainerService().Create(ctx, containers.Container{
		ID: c.ID, Labels: c.Labels, Image: c.Image, Runtime: c.Sandbox.Runtime, Spec: spec,
		SnapshotKey: c.Rootfs.Key, Snapshotter: n.snapshotter, SandboxID: c.Sandbox.ID,
	})
	if err != nil {
		return fmt.Errorf("create container %s: %w", c.ID, err)
	}
	output := (&url.URL{Scheme: "file", Path: c.Log}).String()
	_, err = n.client.TaskService().Create(ctx, &taskapi.CreateTaskRequest{
		ContainerID: c.ID, Rootfs: c.Rootfs.Mounts, Stdout: output, Stderr: output,
	})
	if err != nil {
		return fmt.Errorf("create process of %s: %w", c.ID, errgrpc.ToNative(err))
	}
	return nil
}

// StartTask implements tasks.
func (n *node) StartTask(ctx context.Context, containerID string) error {
	_, err := n.client.TaskService().Start(n.in(ctx), &taskapi.StartRequest{ContainerID: containerID})
	if err != nil {
		return fmt.Errorf("start process of %s: %w", containerID, errgrpc.ToNative(err))
	}
	return nil
}

// StopTask implements tasks.
func (n *node) StopTask(ctx context.Context, containerID string, grace time.Duration) error {
	ctx = n.in(ctx)
	if err := n.stopProcess(ctx, containerID, grace); absent(err) != nil {
		return fmt.Errorf("stop process of %s: %w", containerID, err)
	}
	_, err := n.client.TaskService().Delete(ctx, &taskapi.DeleteTaskRequest{ContainerID: containerID})
	if err := absent(errgrpc.ToNative(err)); err != nil {
		return fmt.Errorf("remove process of %s: %w", containerID, err)
	}
	if err := absent(n.client.ContainerService().Delete(ctx, containerID)); err != nil {
		return fmt.Errorf("remove container %s: %w", containerID, err)
	}
	return nil
}

func (n *node) stopProcess(ctx context.Context, containerID string, grace time.Duration) error {
	if grace > 0 {
		if err := n.kill(ctx, containerID, syscall.SIGTERM); err != nil {
			return err
		}
		if n.await(ctx, containerID, grace) == nil {
			return nil
		}
	}
	if err := n.kill(ctx, containerID, syscall.SIGKILL); err != nil {
		return err
	}
	return n.await(ctx, containerID, killTime)
}

func (n *node) kill(ctx context.Context, containerID string, signal syscall.Signal) error {
	_, err := n.client.TaskService().Kill(ctx, &taskapi.KillRequest{
		ContainerID: containerID, Signal: uint32(signal), All: signal == syscall.SIGKILL,
	})
	return errgrpc.ToNative(err)
}

func (n *node) await(ctx context.Context, containerID string, atMost time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	_, err := n.client.TaskService().Wait(ctx, &taskapi.WaitRequest{ContainerID: containerID})
	return errgrpc.ToNative(err)
}

// MarkServing implements tasks.
func (n *node) MarkServing(ctx context.Context, containerID string) error {
	_, err := n.client.ContainerService().Update(n.in(ctx),
		containers.Container{ID: containerID, Labels: map[string]string{labelServing: "1"}}, "labels."+labelServing)
	if err != nil {
		return fmt.Errorf("mark container %s as serving: %w", containerID, err)
	}
	return nil
}

// Containers implements containerList.
func (n *node) Containers(ctx context.Context) ([]containerInfo, error) {
	ctx = n.in(ctx)
	list, err := n.client.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%q", labelNode, n.name))
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	all, err := n.client.TaskService().List(ctx, &taskapi.ListTasksRequest{})
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", errgrpc.ToNative(err))
	}
	status := map[string]task.Status{}
	for _, t := range all.Tasks {
		status[t.ID] = t.Status
	}
	var found []containerInfo
	for _, c := range list {
		if _, ours := c.Labels[labelClaim]; ours { // a sandbox's pause container carries the other labels too
			found = append(found, containerInfo{
				ID: c.ID, Snapshot: c.SnapshotKey, Labels: c.Labels,
				Running: status[c.ID] == task.Status_RUNNING, Ended: status[c.ID] == task.Status_STOPPED,
			})
		}
	}
	return found, nil
}

// Exits implements containerList.
func (n *node) Exits(ctx context.Context, subscribed func(), tell func(exit)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	envelopes, errs := n.client.EventService().Subscribe(n.in(ctx), fmt.Sprintf("topic==%q,namespace==%q", "/tasks/exit", n.namespace))
	subscribed()
	for {
		select {
		case e := <-envelopes:
			if e == nil {
				continue
			}
			decoded, err := typeurl.UnmarshalAny(e.Event)
			if err != nil {
				return fmt.Errorf("decode event %s: %w", e.Topic, err)
			}
			if t, ok := decoded.(*events.TaskExit); ok && t.ID == t.ContainerID { // not a process executed beside the first
				tell(exit{Container: t.ContainerID, Status: t.ExitStatus})
			}
		case err := <-errs:
			if err == nil {
				err = ctx.Err()
			}
			return err
		}
	}
}
