package instance

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RunSandbox implements sandboxes.
func (n *node) RunSandbox(ctx context.Context, pod string) (sandbox, error) {
	r, err := n.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: pod, Uid: pod, Namespace: "hearth"},
		Hostname: pod,
		Labels:   map[string]string{labelInstance: pod, labelNode: n.name},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: n.cgroups.pod(pod),
			Sysctls:      map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}, // so that port 80 needs no capability
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{
				Network: cri.NamespaceMode_POD, Ipc: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER,
			}},
		},
	}})
	if err != nil {
		return sandbox{}, fmt.Errorf("run sandbox of %s: %w", pod, errgrpc.ToNative(err))
	}
	return n.Inspect(ctx, r.PodSandboxId)
}

// Sandboxes implements sandboxes.
func (n *node) Sandboxes(ctx context.Context) ([]sandbox, error) {
	r, err := n.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{
		Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{labelNode: n.name}},
	})
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", errgrpc.ToNative(err))
	}
	var found []sandbox
	for _, s := range r.Items {
		if pod, ok := s.Labels[labelInstance]; ok {
			found = append(found, sandbox{
				ID: s.Id, Pod: pod,
				Ready: s.State == cri.PodSandboxState_SANDBOX_READY, Created: time.Unix(0, s.CreatedAt),
			})
		}
	}
	return found, nil
}

// Inspect implements sandboxes.
func (n *node) Inspect(ctx context.Context, sandboxID string) (sandbox, error) {
	r, err := n.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: sandboxID, Verbose: true})
	if err != nil {
		return sandbox{}, fmt.Errorf("inspect sandbox %s: %w", sandboxID, errgrpc.ToNative(err))
	}
	status := r.GetStatus()
	s := sandbox{
		ID: sandboxID, Pod: status.GetLabels()[labelInstance],
		Ready: status.GetState() == cri.PodSandboxState_SANDBOX_READY, Created: time.Unix(0, status.GetCreatedAt()),
	}
	if !s.Ready {
		return sandbox{}, fmt.Errorf("sandbox %s has ended: %w", sandboxID, errdefs.ErrFailedPrecondition)
	}
	if s.IP, err = netip.ParseAddr(status.GetNetwork().GetIp()); err != nil {
		return sandbox{}, fmt.Errorf("address of sandbox %s: %w", sandboxID, err)
	}
	var info struct {
		Pid uint32 `json:"pid"`
	}
	if err := json.Unmarshal([]byte(r.GetInfo()["info"]), &info); err != nil {
		return sandbox{}, fmt.Errorf("info of sandbox %s: %w", sandboxID, err)
	}
	if info.Pid == 0 {
		return sandbox{}, fmt.Errorf("sandbox %s has no process: %w", sandboxID, errdefs.ErrFailedPrecondition)
	}
	s.Pid = info.Pid
	if s.Netns, err = inode(namespacePath(s.Pid, "net")); err != nil {
		return sandbox{}, fmt.Errorf("network namespace of sandbox %s: %w", sandboxID, err)
	}
	// The Function's container has to use the very runtime, with the options, that the CRI is configured to give the sandbox.
	pause, err := n.client.ContainerService().Get(n.in(ctx), sandboxID)
	if err != nil {
		return sandbox{}, fmt.Errorf("runtime of sandbox %s: %w", sandboxID, err)
	}
	s.Runtime = pause.Runtime
	return s, nil
}

// RemoveSandbox implements sandboxes.
func (n *node) RemoveSandbox(ctx context.Context, sandboxID, pod string) error {
	if sandboxID != "" {
		_, err := n.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: sandboxID})
		if err := absent(errgrpc.ToNative(err)); err != nil {
			return fmt.Errorf("stop sandbox %s: %w", sandboxID, err)
		}
		_, err = n.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sandboxID})
		if err := absent(errgrpc.ToNative(err)); err != nil {
			return fmt.Errorf("remove sandbox %s: %w", sandboxID, err)
		}
	}
	return n.cgroups.remove(ctx, n.cgroups.pod(pod))
}

// namespacePath is where a process's namespace can be joined.
func namespacePath(pid uint32, kind string) string {
	return "/proc/" + strconv.FormatUint(uint64(pid), 10) + "/ns/" + kind
}

func inode(path string) (uint64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("%s has no inode number", path)
	}
	return st.Ino, nil
}
