package node_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// makeNetwork makes a network namespace as the CRI does, by a process that it is of.
func (n *instanceNode) makeNetwork(name string) (path string, process *os.Process) {
	n.t.Helper()
	p := exec.Command("sleep", "3600")
	p.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	check(n.t, p.Start())
	ended := make(chan struct{})
	go func() { _ = p.Wait(); close(ended) }() // it is killed
	n.t.Cleanup(func() { _ = p.Process.Kill(); <-ended })
	path = filepath.Join(n.networkDir(), name)
	check(n.t, os.WriteFile(path, nil, 0o444))
	check(n.t, unix.Mount("/proc/"+strconv.Itoa(p.Process.Pid)+"/ns/net", path, "", unix.MS_BIND, ""))
	return path, p.Process
}

// TestStrayNetworks: what a containerd leaves that was killed between a network namespace and its record is removed; what a sandbox
// has, whoever's, or a process, is not.
func TestStrayNetworks(t *testing.T) {
	n := newInstanceNode(t)
	n.stop()
	n.strayAge = time.Second
	n.startEngine()
	n.create("live")
	other, err := n.Pods.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "other", Uid: "other", Namespace: "other"},
		Linux:    &cri.LinuxPodSandboxConfig{CgroupParent: n.cgroup + "/other"},
	}})
	check(t, err)
	stray, process := n.makeNetwork("cni-5f3c0c1e-0000-4000-8000-000000000001")
	check(t, process.Kill())
	lived, _ := n.makeNetwork("cni-5f3c0c1e-0000-4000-8000-000000000002")
	before, err := os.ReadDir(n.networkDir())
	check(t, err)
	n.eventually(func() error {
		if _, err := os.Lstat(stray); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the stray one is there: %w", err)
		}
		return nil
	})
	after, err := os.ReadDir(n.networkDir())
	check(t, err)
	if len(before) != 4 || len(after) != 3 {
		t.Errorf("of %v there are %v", before, after)
	}
	n.get(n.activate("live").Instance.Address, "/")
	n.discard("live")
	check(t, unix.Unmount(lived, unix.MNT_DETACH))
	check(t, os.Remove(lived))
	_, err = n.Pods.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: other.PodSandboxId})
	check(t, err)
	_, err = n.Pods.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: other.PodSandboxId})
	check(t, err)
	for _, dir := range n.cgroups() {
		_ = os.Remove(dir) // the other's
	}
	n.eventually(n.leftBehind)
}
