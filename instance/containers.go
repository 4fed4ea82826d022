package instance

import (
	"context"
	"fmt"
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

// CreateTask implements tasks. The container names the sandbox, so that containerd gives it to the shim that runs already. Its
// root file system is a directory of the host's and not a snapshot, until Record.
func (n *node) CreateTask(ctx context.Context, c container) (launcher, error) {
	pid, err := n.runTask(ctx, c)
	if err != nil {
		return nil, err
	}
	l, err := awaitLauncher(ctx, pid, c.Control)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	return l, nil
}

// runTask makes a container and starts its process.
func (n *node) runTask(ctx context.Context, c container) (pid uint32, err error) {
	ctx = n.in(ctx)
	spec, err := typeurl.MarshalAny(c.Spec)
	if err != nil {
		return 0, fmt.Errorf("encode spec of %s: %w", c.ID, err)
	}
	_, err = n.client.ContainerService().Create(ctx, containers.Container{
		ID: c.ID, Labels: c.Labels, Runtime: c.Sandbox.Runtime, Spec: spec, Snapshotter: n.snapshotter, SandboxID: c.Sandbox.ID,
	})
	if err != nil {
		return 0, fmt.Errorf("create container %s: %w", c.ID, err)
	}
	made, err := n.client.TaskService().Create(ctx, &taskapi.CreateTaskRequest{ContainerID: c.ID, Stdout: c.Output, Stderr: c.Output})
	if err != nil {
		return 0, fmt.Errorf("create process of %s: %w", c.ID, errgrpc.ToNative(err))
	}
	if _, err := n.client.TaskService().Start(ctx, &taskapi.StartRequest{ContainerID: c.ID}); err != nil {
		return 0, fmt.Errorf("start process of %s: %w", c.ID, errgrpc.ToNative(err))
	}
	return made.Pid, nil
}

// FindTask implements tasks.
func (n *node) FindTask(ctx context.Context, c container) (launcher, error) {
	r, err := n.client.TaskService().Get(n.in(ctx), &taskapi.GetRequest{ContainerID: c.ID})
	if err != nil {
		return nil, fmt.Errorf("find process of %s: %w", c.ID, errgrpc.ToNative(err))
	}
	find := findLauncher
	if c.Loader {
		find = findLoader
	}
	l, err := find(ctx, r.GetProcess().GetPid(), c.Control)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	return l, nil
}

// StopTask implements tasks.
func (n *node) StopTask(ctx context.Context, containerID, cgroup string, grace time.Duration) error {
	ctx = n.in(ctx)
	if err := n.stopProcess(ctx, containerID, cgroup, grace); absent(err) != nil {
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

// stopProcess ends a container's process and waits for that. Its kill goes to the cgroup itself and not through containerd: that
// costs no execution of runc, and reaches what containerd does not know of, which would keep it from removing the container.
func (n *node) stopProcess(ctx context.Context, containerID, cgroup string, grace time.Duration) error {
	ended := false
	if grace > 0 {
		_, err := n.client.TaskService().Kill(ctx, &taskapi.KillRequest{ContainerID: containerID, Signal: uint32(syscall.SIGTERM)})
		if err := absent(errgrpc.ToNative(err)); err != nil {
			return err
		}
		ended = n.await(ctx, containerID, grace) == nil
	}
	if err := n.cgroups.kill(cgroup); err != nil || ended {
		return err
	}
	return n.await(ctx, containerID, killTime)
}

func (n *node) await(ctx context.Context, containerID string, atMost time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	_, err := n.client.TaskService().Wait(ctx, &taskapi.WaitRequest{ContainerID: containerID})
	return errgrpc.ToNative(err)
}

// Record implements tasks. From here on containerd keeps the snapshot for the container's sake.
func (n *node) Record(ctx context.Context, r record) error {
	c := containers.Container{ID: r.ID, Image: r.Image, SnapshotKey: r.Snapshot, Labels: r.Labels}
	fields := []string{"image", "snapshotkey", "labels"}
	if r.Spec != nil {
		spec, err := typeurl.MarshalAny(r.Spec)
		if err != nil {
			return fmt.Errorf("encode spec of %s: %w", r.ID, err)
		}
		c.Spec, fields = spec, append(fields, "spec")
	}
	if _, err := n.client.ContainerService().Update(n.in(ctx), c, fields...); err != nil {
		return fmt.Errorf("record what container %s has become: %w", r.ID, err)
	}
	return nil
}

// Label implements tasks.
func (n *node) Label(ctx context.Context, containerID string, labels map[string]string) error {
	var paths []string
	for k := range labels {
		paths = append(paths, "labels."+k)
	}
	if _, err := n.client.ContainerService().Update(n.in(ctx), containers.Container{ID: containerID, Labels: labels}, paths...); err != nil {
		return fmt.Errorf("label container %s: %w", containerID, err)
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
	processes := map[string]*task.Process{}
	for _, t := range all.Tasks {
		processes[t.ID] = t
	}
	var found []containerInfo
	for _, c := range list {
		if c.ID == containerID(c.Labels[labelInstance]) { // a sandbox's pause container has the label too
			info := containerInfo{ID: c.ID, Snapshot: c.SnapshotKey, Labels: c.Labels, Pid: processes[c.ID].GetPid()}
			switch processes[c.ID].GetStatus() {
			case task.Status_RUNNING, task.Status_PAUSED, task.Status_PAUSING:
				info.Running = true
			case task.Status_STOPPED:
				info.Ended = true
			}
			found = append(found, info)
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
