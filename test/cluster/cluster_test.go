package cluster_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/test/cluster"
)

// patience is how long anything of the cluster may take on a machine that does much else.
const patience = 4 * time.Minute

// bed is a cluster with a probe on each node.
type bed struct {
	*cluster.Cluster
	pods map[string]string // the probes' addresses by node
	name map[string]string // and names
}

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

// deploy compiles the probe, which pods find in a folder of their node, and pushes an image that it can run in.
func (b *bed) deploy(t *testing.T) {
	t.Helper()
	folder := t.TempDir()
	compile := exec.Command("go", "build", "-o", filepath.Join(folder, "probe"), "./testdata/probe")
	compile.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("compile the probe: %v\n%s", err, out)
	}
	layout, err := images.Build(t.Context(), images.Config{Cache: cacheFolder()}, "pause")
	if err != nil {
		t.Fatal(err)
	}
	image := b.Registry() + "/test/base:1"
	if _, err := images.Push(t.Context(), layout, image); err != nil {
		t.Fatal(err)
	}
	manifest, err := os.ReadFile("testdata/probes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer("IMAGE", image, "FOLDER", folder).Replace(string(manifest))
	b.kubectl(t, text, "apply", "-f", "-")
	b.kubectl(t, "", "rollout", "status", "daemonset/probe", "--timeout", patience.String())
	b.findPods(t)
}

func (b *bed) findPods(t *testing.T) {
	t.Helper()
	b.pods, b.name = map[string]string{}, map[string]string{}
	out := b.kubectl(t, "", "get", "pods", "-l", "app=probe", "-o", `jsonpath={range .items[*]}{.spec.nodeName} {.status.podIP} {.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		var node, address, name string
		if _, err := fmt.Sscan(line, &node, &address, &name); err != nil {
			t.Fatalf("pods: %q: %v", out, err)
		}
		b.pods[node], b.name[node] = address, name
	}
	if len(b.pods) != len(b.Nodes()) {
		t.Fatalf("probes run on %d of %d nodes:\n%s", len(b.pods), len(b.Nodes()), out)
	}
}

func cacheFolder() string {
	if dir := os.Getenv("HEARTH_CACHE"); dir != "" {
		return dir
	}
	return filepath.Join("..", "..", ".cache")
}

func (b *bed) kubectl(t *testing.T, input string, args ...string) string {
	t.Helper()
	out, err := b.tryKubectl(t.Context(), input, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (b *bed) tryKubectl(ctx context.Context, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.Tool("kubectl"), append([]string{"--kubeconfig", b.Kubeconfig()}, args...)...)
	cmd.Stdin = strings.NewReader(input)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, errs.String())
	}
	return string(out), nil
}

// eventually tries until there is no error.
func eventually(t *testing.T, try func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return
		}
		if !host.Pause(ctx, 100*time.Millisecond) {
			t.Fatal(err)
		}
	}
}

func get(ctx context.Context, address string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return string(body), err
}

// through asks the probe of a node to ask another.
func (b *bed) through(node, address string) string {
	return "http://" + b.pods[node] + ":8080/get?url=" + url.QueryEscape(address)
}

// wants tries until an address answers one of the texts.
func wants(t *testing.T, address string, texts ...string) {
	t.Helper()
	eventually(t, func(ctx context.Context) error {
		got, err := get(ctx, address)
		if err != nil {
			return fmt.Errorf("%s: %w", address, err)
		}
		for _, text := range texts {
			if strings.Contains(got, text) {
				return nil
			}
		}
		return fmt.Errorf("%s: got %q, want one of %q", address, got, texts)
	})
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

// processesOf are all processes in the cluster's cgroups, with their cgroup.
func processesOf(t *testing.T, dir string) map[int]string {
	t.Helper()
	left, err := cluster.Leftovers(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[int]string{}
	for _, line := range left {
		root, ok := strings.CutPrefix(line, "cgroup ")
		if !ok {
			continue
		}
		_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				for _, pid := range host.Processes(path) {
					out[pid] = path
				}
			}
			return nil
		})
	}
	return out
}

// startTimes tells processes from later ones of the same id.
func startTimes(pids map[int]string) map[int]string {
	out := map[int]string{}
	for pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if words := strings.Fields(rest); len(words) > 19 && words[0] != "Z" {
			out[pid] = words[19]
		}
	}
	return out
}
