package node_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// kubelet does to containerd what a kubelet does for a Pod of one container: cgroup, sandbox, container, in this order, and what it
// does when the Pod is deleted.
type kubelet struct {
	n         *instanceNode
	sandboxes map[string]string // by pod
	holders   map[string]string
}

// newKubeletNode is an instanceNode whose engine leaves sandboxes to a kubelet.
func newKubeletNode(t *testing.T) (*instanceNode, *kubelet) {
	n := newInstanceNode(t)
	n.stop()
	n.kubelet = "hearth"
	n.startEngine()
	return n, &kubelet{n: n, sandboxes: map[string]string{}, holders: map[string]string{}}
}

func (k *kubelet) config(pod string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: pod, Uid: "uid-" + pod, Namespace: "hearth"}, Hostname: pod,
		LogDirectory: filepath.Join(k.n.Dir, "pods", pod),
		DnsConfig:    &cri.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"hearth.svc.cluster.local"}},
		Labels: map[string]string{
			"hearth.dev/instance": pod, "hearth.dev/pool": "small",
			"io.kubernetes.pod.name": pod, "io.kubernetes.pod.namespace": "hearth", "io.kubernetes.pod.uid": "uid-" + pod,
		},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: k.n.cgroup + "/pod" + pod,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{
				Network: cri.NamespaceMode_POD, Ipc: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER,
			}},
		},
	}
}

// groups are the directories of a pod's cgroup.
func (k *kubelet) groups(pod string) []string {
	found, _ := filepath.Glob("/sys/fs/cgroup/*" + k.n.cgroup + "/pod" + pod)
	if dir := "/sys/fs/cgroup" + k.n.cgroup + "/pod" + pod; len(found) == 0 {
		found = []string{dir}
	}
	return found
}

// run brings a Pod up.
func (k *kubelet) run(pod string) {
	t := k.n.t
	t.Helper()
	ctx, config := t.Context(), k.config(pod)
	for _, hierarchy := range []string{"memory", "cpu", "pids"} { // and no freezer
		if _, err := os.Stat("/sys/fs/cgroup/" + hierarchy); err == nil {
			check(t, os.MkdirAll("/sys/fs/cgroup/"+hierarchy+config.Linux.CgroupParent, 0o755))
		}
	}
	box, err := k.n.Pods.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	check(t, err)
	k.sandboxes[pod] = box.PodSandboxId
	made, err := k.n.Pods.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: box.PodSandboxId, SandboxConfig: config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "function"}, Image: &cri.ImageSpec{Image: k.n.pause}, LogPath: "function.log",
			Labels: map[string]string{"io.kubernetes.container.name": "function", "io.kubernetes.pod.namespace": "hearth"},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				ReadonlyRootfs: true, NoNewPrivs: true, RunAsUser: &cri.Int64Value{Value: 65532},
				Capabilities: &cri.Capability{DropCapabilities: []string{"ALL"}},
			}},
		},
	})
	check(t, err)
	k.holders[pod] = made.ContainerId
	_, err = k.n.Pods.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.ContainerId})
	check(t, err)
}

// remove does what follows a deletion of a Pod.
func (k *kubelet) remove(pods ...string) {
	t := k.n.t
	t.Helper()
	for _, pod := range pods {
		_, err := k.n.Pods.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: k.sandboxes[pod]})
		check(t, err)
		_, err = k.n.Pods.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: k.sandboxes[pod]})
		check(t, err)
		k.n.eventually(func() error {
			for _, dir := range k.groups(pod) {
				if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
			}
			return nil
		})
	}
}

// create makes an Instance and then its Pod, which may come late.
func (k *kubelet) create(id string) {
	k.n.t.Helper()
	made := make(chan error, 1)
	go func() {
		_, err := k.n.calls.CreateInstance(context.Background(), connect.NewRequest(&hearthv1.CreateInstanceRequest{Id: id}))
		made <- err
	}()
	k.run(id)
	check(k.n.t, <-made)
}

// exec is kubectl exec.
func (k *kubelet) exec(pod string, command ...string) (*cri.ExecSyncResponse, error) {
	return k.n.Pods.ExecSync(k.n.t.Context(), &cri.ExecSyncRequest{ContainerId: k.holders[pod], Cmd: command, Timeout: 60})
}

// wantLog waits for a line of kubectl logs.
func (k *kubelet) wantLog(pod, line string) {
	k.n.t.Helper()
	k.n.eventually(func() error {
		text, err := os.ReadFile(filepath.Join(k.n.Dir, "pods", pod, "function.log"))
		if err == nil && !strings.Contains(string(text), " stdout F "+line+"\n") {
			err = fmt.Errorf("the pod's log has no %q: %q", line, text)
		}
		return err
	})
}

// ready tells whether containerd holds a pod's sandbox to be so.
func (k *kubelet) ready(pod string) bool {
	k.n.t.Helper()
	r, err := k.n.Pods.PodSandboxStatus(k.n.t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: k.sandboxes[pod]})
	check(k.n.t, err)
	return r.Status.State == cri.PodSandboxState_SANDBOX_READY
}

// TestKubeletPod: an Instance lives in a Pod of the kubelet's: in its network, cgroup and logs, with its name servers, seen by
// kubectl exec; through freezing and a restart of the engine; and is discarded without it.
func TestKubeletPod(t *testing.T) {
	n, k := newKubeletNode(t)
	k.run("nobodys")
	k.create("one")
	answer := n.activate("one")
	address := answer.Instance.Address
	t.Logf("start:%s", describe(answer.Phases))
	if got := n.get(address, "/file?name=/etc/resolv.conf"); !strings.Contains(got, "nameserver 10.96.0.10") || !strings.Contains(got, "search hearth.svc.cluster.local") {
		t.Errorf("its resolv.conf is %q", got)
	}
	if got := n.get(address, "/file?name=/etc/hostname"); got != "one\n" {
		t.Errorf("its host name is %q", got)
	}
	if got, want := n.get(address, "/file?name=/proc/self/cgroup"), n.cgroup+"/podone/fn"; !strings.Contains(got, ":memory:"+want+"\n") && !strings.Contains(got, "0::/\n") {
		t.Errorf("it is in the cgroups %q, want %s", got, want)
	}
	wantConfined(t, n.get(address, "/file?name=/proc/self/status"))
	n.get(address, "/log?line=a+word")
	n.wantLogs("one listening on 8080", "one a word")
	k.wantLog("one", "listening on 8080")
	k.wantLog("one", "a word")
	n.eventually(func() error {
		r, err := k.exec("one", "/function", "exit")
		if err == nil && (r.ExitCode != 3 || !strings.Contains(string(r.Stdout), "line 29\n")) {
			err = fmt.Errorf("the function's program, executed in the pod: status %d, %q", r.ExitCode, r.Stdout)
		}
		return err
	})
	n.eventually(func() error { return n.recorded("one") })

	n.freeze("one")
	n.stop()
	n.startEngine()
	n.wantStates(map[string]hearthv1.State{"one": hearthv1.State_STATE_FROZEN})
	if _, err := n.tryActivate("one", "again", n.revision(), 30*time.Second); err != nil {
		t.Fatal(err)
	}
	n.get(address, "/log?line=thawed")
	k.wantLog("one", "thawed")

	n.discard("one")
	n.wantStates(nil)
	if !k.ready("one") || !k.ready("nobodys") {
		t.Error("the engine has removed a sandbox of the kubelet's")
	}
	if _, err := k.exec("one", "/function", "exit"); err == nil {
		t.Error("the function's files are still there when it is not")
	}
	for _, dir := range k.groups("one") {
		for _, name := range []string{"fn", "sidecar"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				t.Errorf("cgroup %s is left behind", filepath.Join(dir, name))
			}
		}
	}
	k.remove("one", "nobodys")
	n.eventually(n.leftBehind)
}

func (n *instanceNode) wantStates(want map[string]hearthv1.State) {
	n.t.Helper()
	if got := n.states(); fmt.Sprint(got) != fmt.Sprint(want) && len(got)+len(want) > 0 {
		n.t.Fatalf("states are %v, want %v", got, want)
	}
}

// TestKubeletPodEnds: an Instance ends with its Pod, whatever it does and whoever is there to see it.
func TestKubeletPodEnds(t *testing.T) {
	n, k := newKubeletNode(t)
	for _, id := range []string{"warm", "serves", "frozen", "unseen"} {
		k.create(id)
	}
	for _, id := range []string{"serves", "frozen", "unseen"} {
		n.activate(id)
		n.eventually(func() error { return n.recorded(id) })
	}
	n.freeze("frozen")
	n.freeze("unseen")
	for _, id := range []string{"warm", "serves", "frozen"} {
		begin := time.Now()
		k.remove(id)
		n.eventually(func() error {
			if state, there := n.states()[id]; there {
				return fmt.Errorf("%s is %s", id, state)
			}
			return nil
		})
		t.Logf("%s ended within %s of its pod's deletion", id, time.Since(begin))
	}
	n.stop()
	_, err := n.Pods.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: k.sandboxes["unseen"]})
	check(t, err)
	n.startEngine()
	k.remove("unseen")
	n.eventually(n.leftBehind)
}
