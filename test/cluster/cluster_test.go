package cluster_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/test/cluster"
)

// patience is how long anything of the cluster may take on a machine that does much else.
const patience = 4 * time.Minute

func TestCluster(t *testing.T) {
	cluster.Skip(t)
	dir, err := os.MkdirTemp("/tmp", "hearth-cluster-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.Down(context.Background(), dir); err != nil && !errors.Is(err, cluster.ErrDown) {
			t.Error(err)
		}
		_ = os.RemoveAll(dir)
	})
	c, err := cluster.Start(t.Context(), cluster.Config{Dir: dir, Progress: func(line string) { t.Log(line) }})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.Start(t.Context(), cluster.Config{Dir: dir}); !errors.Is(err, cluster.ErrUp) {
		t.Errorf("a second start: %v", err)
	}
	b := &bed{Cluster: c}
	b.deploy(t)
	for _, part := range []struct {
		name string
		test func(*bed, *testing.T)
	}{
		{"Pods", (*bed).testPods}, {"Services", (*bed).testServices}, {"Folders", (*bed).testFolders},
		{"Kubectl", (*bed).testKubectl}, {"APIServer", (*bed).testAPIServer}, {"Kill", (*bed).testKill}, {"Down", (*bed).testDown},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.test(b, t) }) {
			return
		}
	}
}

func (b *bed) testPods(t *testing.T) {
	zones := map[string]bool{}
	for _, n := range b.Nodes() {
		zones[n.Zone()] = true
		wants(t, "http://"+b.pods[n.Name()]+":8080/", b.name[n.Name()]) // from the host
		for _, other := range b.Nodes() {
			wants(t, b.through(n.Name(), "http://"+b.pods[other.Name()]+":8080/"), b.name[other.Name()])
		}
		wants(t, b.through(n.Name(), "http://"+b.Registry()+"/v2/_catalog"), "test/base")
	}
	if len(zones) != 2 {
		t.Errorf("nodes are in the zones %v, want two", zones)
	}
	if got := b.kubectl(t, "", "get", "nodes", "-L", "topology.kubernetes.io/zone", "--no-headers"); !strings.Contains(got, " a\n") || !strings.Contains(got, " b\n") {
		t.Errorf("nodes without their zones:\n%s", got)
	}
}

func (b *bed) testServices(t *testing.T) {
	var names []string
	for _, name := range b.name {
		names = append(names, name)
	}
	for _, n := range b.Nodes() {
		for _, service := range []string{"probe", "probe.default.svc.cluster.local"} {
			for _, name := range names { // each probe is reached at some time, the node's own one too
				wants(t, b.through(n.Name(), "http://"+service+"/"), name)
			}
		}
	}
	address := b.kubectl(t, "", "get", "service", "probe", "-o", "jsonpath={.spec.clusterIP}")
	wants(t, "http://"+address+"/", names...) // from the host
}

// testFolders: what a pod sees of its node by the usual paths is the node's own, and what it mounts there is seen there.
func (b *bed) testFolders(t *testing.T) {
	for _, n := range b.Nodes() {
		wants(t, "http://"+b.pods[n.Name()]+":8080/dir?path=/containerd", "containerd.sock")
		own := filepath.Join(n.Dir(), "var/lib/hearth")
		if err := os.MkdirAll(filepath.Join(own, "mounted"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(own, "of-"+n.Name()), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := get(t.Context(), "http://"+b.pods[n.Name()]+":8080/dir?path=/var/lib/hearth")
		if err != nil || strings.Count(got, "of-") != 1 || !strings.Contains(got, "of-"+n.Name()) {
			t.Errorf("the pod on %s sees %q of its node (%v)", n.Name(), got, err)
		}
		// In the pod's mount namespace, as its program would.
		pid := b.podProcess(t, n)
		b.onNode(t, n, "nsenter", "--target", pid, "--mount=/proc/"+pid+"/ns/mnt", "--", "/probe/probe", "x")
		b.onNode(t, n, "mount", "-t", "tmpfs", "none", "/var/lib/hearth/mounted")
		mounts, err := os.ReadFile("/proc/" + pid + "/mountinfo")
		if err != nil || !strings.Contains(string(mounts), " /var/lib/hearth/mounted ") {
			t.Errorf("what is mounted on %s does not come into its pod (%v)", n.Name(), err)
		}
		if out := b.onNode(t, n, "findmnt", "-n", "-o", "PROPAGATION", "/var/lib/hearth/mounted"); !strings.Contains(out, "shared") {
			t.Errorf("mounts of %s are %q, want shared", n.Name(), out)
		}
		b.onNode(t, n, "umount", "/var/lib/hearth/mounted")
		if out := b.onNode(t, n, "hostname"); strings.TrimSpace(out) != n.Name() {
			t.Errorf("%s calls itself %q", n.Name(), out)
		}
	}
}

// podProcess is the probe's process on a node.
func (b *bed) podProcess(t *testing.T, n *cluster.Node) string {
	t.Helper()
	id := b.kubectl(t, "", "get", "pod", b.name[n.Name()], "-o", "jsonpath={.status.containerStatuses[0].containerID}")
	for line := range strings.Lines(b.onNode(t, n, "ctr", "-n", "k8s.io", "tasks", "ls")) {
		if words := strings.Fields(line); len(words) > 1 && strings.HasSuffix(id, "/"+words[0]) {
			return words[1]
		}
	}
	t.Fatalf("containerd of %s does not know the container %s", n.Name(), id)
	return ""
}

func (b *bed) onNode(t *testing.T, n *cluster.Node, name string, args ...string) string {
	t.Helper()
	cmd, err := n.Command(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("on %s: %s %v: %v\n%s", n.Name(), name, args, err, out)
	}
	return string(out)
}

func (b *bed) testKubectl(t *testing.T) {
	pod := b.name["node-1"]
	if out := b.kubectl(t, "", "logs", pod); !strings.Contains(out, "probe serves") {
		t.Errorf("logs: %q", out)
	}
	if out := b.kubectl(t, "", "exec", pod, "--", "/probe/probe", "x"); !strings.Contains(out, "executed in "+pod) {
		t.Errorf("exec: %q", out)
	}
	forbidden, err := b.tryKubectl(t.Context(), "", "auth", "can-i", "list", "secrets", "--as", "system:serviceaccount:default:default")
	if err == nil {
		t.Errorf("a service account without a role may list secrets: %q", forbidden)
	}
	namespace := `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}`
	b.kubectl(t, namespace, "apply", "-f", "-")
	if _, err := b.tryKubectl(t.Context(), "", "run", "root", "-n", "strict", "--image", "x", "--privileged"); err == nil || !strings.Contains(err.Error(), "PodSecurity") {
		t.Errorf("a privileged pod in a restricted namespace: %v", err)
	}
}

func (b *bed) testAPIServer(t *testing.T) {
	if err := b.StopAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := b.tryKubectl(t.Context(), "", "get", "nodes"); err == nil {
		t.Error("the API server answers when it was stopped")
	}
	if got, err := get(t.Context(), b.through("node-1", "http://"+b.pods["node-2"]+":8080/")); err != nil || got != b.name["node-2"] {
		t.Errorf("without an API server pods do not reach each other: %q, %v", got, err)
	}
	if err := b.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.kubectl(t, "", "get", "nodes")
}

func (b *bed) testKill(t *testing.T) {
	lost := b.Node("node-2")
	if err := lost.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := lost.Command(t.Context(), "true"); err == nil {
		t.Error("a node that was killed runs commands")
	}
	if got, err := get(t.Context(), "http://"+b.pods["node-2"]+":8080/"); err == nil {
		t.Errorf("a pod of a node that was killed answers %q", got)
	}
	wants(t, "http://"+b.pods["node-1"]+":8080/", b.name["node-1"])
	b.kubectl(t, "", "wait", "node/node-2", "--for=condition=Ready=Unknown", "--timeout", patience.String())
	if err := lost.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := lost.Restart(t.Context()); err == nil {
		t.Error("a node that is up is started again")
	}
	b.kubectl(t, "", "rollout", "status", "daemonset/probe", "--timeout", patience.String())
	eventually(t, func(ctx context.Context) error { // the pod has another address then
		address, err := b.tryKubectl(ctx, "", "get", "pods", "-l", "app=probe", "--field-selector", "spec.nodeName=node-2", "-o", "jsonpath={.items[0].status.podIP}")
		if err != nil {
			return err
		}
		_, err = get(ctx, b.through("node-1", "http://"+address+":8080/"))
		return err
	})
}

// testDown: whoever looks after a cluster may have been killed, and parts of the cluster too.
func (b *bed) testDown(t *testing.T) {
	before := processesOf(t, b.Dir())
	if len(before) < 20 {
		t.Fatalf("%d processes are the cluster's: some are not found", len(before))
	}
	for pid, group := range before {
		if !strings.Contains(group, "/kubepods/") {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	began := startTimes(before)
	if err := b.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := cluster.Leftovers(b.Dir()); err != nil || len(left) > 0 {
		t.Errorf("left after down: %q, %v", left, err)
	}
	if _, err := os.Stat(b.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder after down: %v", err)
	}
	for pid, start := range startTimes(before) {
		if start == began[pid] {
			t.Errorf("process %d, of cgroup %s, is left after down", pid, before[pid])
		}
	}
	mounts, err := os.ReadFile(host.MountInfo)
	if err != nil || strings.Contains(string(mounts), b.Dir()) {
		t.Errorf("mounts are left after down (%v):\n%s", err, mounts)
	}
	if rules, err := exec.Command("iptables-save").Output(); err == nil && strings.Contains(string(rules), "KUBE-") {
		t.Errorf("the host has Kubernetes' packet filters:\n%s", rules)
	}
	if err := b.Down(t.Context()); !errors.Is(err, cluster.ErrDown) {
		t.Errorf("down again: %v", err)
	}
}
