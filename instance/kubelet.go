package instance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	taskapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels that the kubelet gives to what it makes.
const (
	kubeletPod       = "io.kubernetes.pod.name"
	kubeletNamespace = "io.kubernetes.pod.namespace"
	kubeletContainer = "io.kubernetes.container.name"
)

// holderName is the name of the one container of an Instance's Pod.
const holderName = "function"

// How often it is looked whether the kubelet has made a sandbox. It takes some hundred milliseconds for it.
const lookFirst, lookMost = 10 * time.Millisecond, 200 * time.Millisecond

// kubeletNode is a node whose sandboxes the kubelet makes, of Pods in one namespace.
type kubeletNode struct {
	*node
	pods string // the namespace
}

// RunSandbox implements sandboxes: it waits for the kubelet.
func (n *kubeletNode) RunSandbox(ctx context.Context, pod string) (sandbox, error) {
	for delay := lookFirst; ; delay = min(delay*3/2, lookMost) {
		s, err := n.find(ctx, pod)
		if err == nil {
			return s, nil
		}
		if errdefs.IsUnavailable(err) {
			return sandbox{}, err
		}
		if !sleep(ctx, delay) {
			return sandbox{}, fmt.Errorf("the kubelet has not brought up pod %s/%s, see its events: %w: %w", n.pods, pod, err, ctx.Err())
		}
	}
}

// find is the sandbox of a pod, when all of it is there.
func (n *kubeletNode) find(ctx context.Context, pod string) (sandbox, error) {
	found, err := n.list(ctx, map[string]string{labelInstance: pod, kubeletPod: pod, kubeletNamespace: n.pods})
	switch {
	case err != nil:
		return sandbox{}, err
	case len(found) == 0:
		return sandbox{}, fmt.Errorf("it has no sandbox: %w", errdefs.ErrNotFound)
	}
	return n.Inspect(ctx, found[0].ID)
}

// Sandboxes implements sandboxes.
func (n *kubeletNode) Sandboxes(ctx context.Context) ([]sandbox, error) {
	return n.list(ctx, map[string]string{kubeletNamespace: n.pods})
}

// list finds sandboxes of Instances by labels, of each pod the newest: the kubelet makes another one when a pod's has ended, and
// removes the former when it likes.
func (n *kubeletNode) list(ctx context.Context, labels map[string]string) ([]sandbox, error) {
	r, err := n.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: labels}})
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", errgrpc.ToNative(err))
	}
	newest := map[string]sandbox{}
	for _, s := range r.Items {
		pod := s.Labels[labelInstance]
		if pod == "" || pod != s.Labels[kubeletPod] { // whoever may label Pods cannot have one taken for another's
			continue
		}
		if at := time.Unix(0, s.CreatedAt); at.After(newest[pod].Created) {
			newest[pod] = sandbox{ID: s.Id, Pod: pod, Ready: s.State == cri.PodSandboxState_SANDBOX_READY, Created: at, Foreign: true}
		}
	}
	found := make([]sandbox, 0, len(newest))
	for _, s := range newest {
		found = append(found, s)
	}
	return found, nil
}

// Inspect implements sandboxes.
func (n *kubeletNode) Inspect(ctx context.Context, sandboxID string) (sandbox, error) {
	s, err := n.node.Inspect(ctx, sandboxID)
	if err != nil {
		return sandbox{}, err
	}
	s.Foreign = true
	if s.Holder, err = n.holder(ctx, sandboxID); err != nil {
		return sandbox{}, err
	}
	s.Holder.Group, err = podGroupOf("/proc", s.Pid)
	return s, err
}

// holder finds the container that the kubelet runs in a sandbox.
func (n *kubeletNode) holder(ctx context.Context, sandboxID string) (holder, error) {
	r, err := n.runtime.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
		PodSandboxId: sandboxID, LabelSelector: map[string]string{kubeletContainer: holderName},
		State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		return holder{}, fmt.Errorf("list containers of sandbox %s: %w", sandboxID, errgrpc.ToNative(err))
	}
	if len(r.Containers) != 1 {
		return holder{}, fmt.Errorf("its container %q does not run: %w", holderName, errdefs.ErrFailedPrecondition)
	}
	h := holder{ID: r.Containers[0].Id}
	task, err := n.client.TaskService().Get(n.in(ctx), &taskapi.GetRequest{ContainerID: h.ID})
	if err != nil {
		return holder{}, fmt.Errorf("process of container %s: %w", h.ID, errgrpc.ToNative(err))
	}
	h.Pid = task.GetProcess().GetPid()
	return h, h.look()
}

// look finds what there is to know of a holder's process.
func (h *holder) look() error {
	proc := "/proc/" + strconv.FormatUint(uint64(h.Pid), 10)
	var st unix.Stat_t
	if err := unix.Stat(proc+"/fd/1", &st); err != nil {
		return fmt.Errorf("output of process %d: %w", h.Pid, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFIFO { // of a container with a terminal it is something else, and not written to
		h.Pipe = st.Ino
	}
	root, err := os.OpenFile(proc+"/root", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("files of process %d: %w", h.Pid, err)
	}
	defer root.Close()
	h.Etc = map[string][]byte{}
	for _, name := range []string{fileHosts, fileHostname, fileResolvConf} {
		text, err := readIn(root, "etc/"+name, maxResolvConf)
		switch {
		case errors.Is(err, unix.ENOENT):
		case err != nil:
			return fmt.Errorf("/etc/%s of process %d: %w", name, h.Pid, err)
		case len(text) > 0: // an empty one is only a place for a mount
			h.Etc[name] = text
		}
	}
	return nil
}

// readIn reads the beginning of a file of a tree, which is the root for all links in it.
func readIn(tree *os.File, path string, most int64) ([]byte, error) {
	at, err := openIn(tree, path, 0)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(at.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("it is no file")
	}
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(int(at.Fd())))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most))
}

// RemoveSandbox implements sandboxes. The kubelet removes the sandbox when its Pod is deleted; what is ours goes now.
func (n *kubeletNode) RemoveSandbox(ctx context.Context, _, pod string) error {
	if err := n.cgroups.removeOwn(ctx, pod); err != nil {
		return err
	}
	n.cgroups.learnt.forget(pod)
	return nil
}

// refusesLimit tells whether an error of limitCPU says that the pod's own limit is lower: with version 1 of cgroups one below another
// cannot have more. The pod's holds then.
func (c cgroups) refusesLimit(err error) bool {
	return c.learnt != nil && errors.Is(err, unix.EINVAL)
}
