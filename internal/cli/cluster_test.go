package cli_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/hearth-serverless/hearth/internal/cli"
	"github.com/hearth-serverless/hearth/internal/kube/kubetest"
)

// fakeCluster is a cluster without nodes: an API server in memory, in which everything that is applied is ready at once. What answers for its gateway
// and registry is a fake's.
type fakeCluster struct {
	*kubetest.Server
	*fake
	kubeconfig string
}

func newCluster(t *testing.T) *fakeCluster {
	t.Helper()
	c := &fakeCluster{Server: kubetest.New(t), fake: &fake{}}
	c.OnWrite = func(u *unstructured.Unstructured) {
		u.Object["status"] = map[string]any{
			"observedGeneration": u.GetGeneration(), "latestRevision": u.GetName() + "-00001", "warm": int64(2), "desired": int64(2), "nodes": int64(1),
			"conditions": []any{map[string]any{"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": "2026-01-01T00:00:00Z"}},
		}
	}
	c.kubeconfig = c.Kubeconfig(t)
	web := httptest.NewServer(c.fake)
	t.Cleanup(web.Close)
	c.Ports["gateway-x"] = strings.TrimPrefix(web.URL, "http://")
	c.Server.Logs["i-1"] = "one\ntwo\n"
	const system = "/api/v1/namespaces/hearth-system/"
	for _, name := range []string{"nodeagent", "poolmanager", "gateway"} {
		c.Put(system+"pods/"+name+"-x", pod(name+"-x", "hearth-system", map[string]any{"app.kubernetes.io/name": "hearth", "app.kubernetes.io/component": name}))
	}
	c.Put(system+"services/hearth-gateway", map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"name": "hearth-gateway"}})
	c.Put(system+"configmaps/hearth", map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "hearth"}, "data": map[string]any{"registry": c.registry(t)}})
	c.Put("/apis/coordination.k8s.io/v1/namespaces/hearth-system/leases/hearth-poolmanager", map[string]any{
		"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": map[string]any{"name": "hearth-poolmanager", "annotations": map[string]any{"hearth.dev/epoch": "7"}},
		"spec": map[string]any{"holderIdentity": "poolmanager-x_1", "leaseDurationSeconds": 4, "renewTime": time.Now().UTC().Format(metav1.RFC3339Micro)},
	})
	c.Put("/api/v1/namespaces/hearth/pods/i-1", pod("i-1", "hearth", map[string]any{"hearth.dev/instance": "i-1", "hearth.dev/function": "hello"}))
	c.Put("/api/v1/namespaces/hearth/pods/i-2", pod("i-2", "hearth", map[string]any{"hearth.dev/instance": "i-2"}))
	return c
}

func pod(name, namespace string, labels map[string]any) map[string]any {
	return map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "namespace": namespace, "labels": labels},
		"spec":   map[string]any{"nodeName": "n1", "containers": []any{map[string]any{"name": "x", "image": "reg/hearth/x:v7"}}},
		"status": map[string]any{"phase": "Running", "conditions": []any{map[string]any{"type": "Ready", "status": "True"}}},
	}
}

// place is a deployment of either kind, by the flags that choose it.
type place struct{ flags []string }

func (p place) want(t *testing.T, code int, contains string, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	got := cli.Exec(t.Context(), append(append([]string{}, p.flags...), args...), strings.NewReader(""), &out, &errs)
	if got != code || !strings.Contains(out.String()+errs.String(), contains) {
		t.Errorf("%q: exit code %d, want %d and %q; out %q, err %q", args, got, code, contains, out.String(), errs.String())
	}
	return out.String()
}

// TestDeployments is the suite of the seam: the same words have the same outcome on a machine and on a cluster.
func TestDeployments(t *testing.T) {
	for name, flags := range map[string]func(*testing.T) []string{
		"machine": func(t *testing.T) []string { return []string{"--run", newFake(t).run} },
		"cluster": func(t *testing.T) []string { return []string{"--kubeconfig", newCluster(t).kubeconfig} },
	} {
		t.Run(name, func(t *testing.T) {
			p := place{flags(t)}
			p.want(t, 0, "[]", "list", "-o", "json")
			p.want(t, 0, "hello is deployed as hello-00001", "deploy", "hello", "--image", "reg/hello:1", "-e", "A=b", "--memory", "512Mi")
			p.want(t, 0, "/fn/hello\n", "deploy", "hello", "--image", "reg/hello:1", "-e", "A=b", "--memory", "512Mi")
			p.want(t, 0, "reg/hello:1", "list")
			p.want(t, 0, "memory ", "get", "hello")
			p.want(t, 4, "there is no function other; see `hearth list`", "get", "other")
			p.want(t, 0, "i-1        serving   sandbox", "ps")
			p.want(t, 0, "STATE_WARM", "ps", "-o", "json")
			p.want(t, 0, "i-1 | one\ni-1 | two\n", "logs", "hello")
			p.want(t, 0, "one\ntwo\n", "logs", "hello", "--instance", "i-1")
			p.want(t, 0, `POST /fn/hello "text"`, "invoke", "hello", "-d", "text")
			p.want(t, 5, "502 Bad Gateway", "invoke", "hello", "broken")
			p.want(t, 0, "runtime python is applied", "runtime", "apply", "python", "--image", "reg/python:1", "--warm", "2", "--preload", "numpy")
			p.want(t, 0, "python   1            2      numpy", "runtime", "ls")
			p.want(t, 0, "python", "pool", "ls")
			p.want(t, 0, "pool python is applied", "pool", "apply", "python", "--runtime", "python", "--size", "3")
			p.want(t, 0, `"size": 3`, "pool", "ls", "-o", "json")
			p.want(t, 0, "hello\n:4", "__complete", "invoke", "")
			p.want(t, 0, "python\n:4", "__complete", "runtime", "rm", "")
			p.want(t, 0, "packed for python", "deploy", "hello", folder(t, map[string]string{"main.py": "x"}), "-o", "table")
			p.want(t, 1, "function hello needs it; see `hearth list`", "runtime", "rm", "python")
			p.want(t, 4, "there is no function other; see `hearth list`", "delete", "other")
		})
	}
}

func TestClusterStatus(t *testing.T) {
	c := newCluster(t)
	p := place{[]string{"--kubeconfig", c.kubeconfig}}
	out := p.want(t, 0, "0 functions, 1 warm sandboxes, 1 serving, 0 frozen", "status")
	for _, want := range []string{"Cluster of context test at " + c.URL(), "poolmanager-x_1 leads, epoch 7", "poolmanager (leads)", "v7"} {
		if !strings.Contains(out, want) {
			t.Errorf("does not say %q: %s", want, out)
		}
	}
	var s struct {
		Context, Leader string
		Epoch           int
		Daemons         []struct{ Name string }
	}
	if err := json.Unmarshal([]byte(p.want(t, 0, "", "status", "-o", "json")), &s); err != nil || s.Epoch != 7 || len(s.Daemons) != 3 {
		t.Errorf("%+v, %v", s, err)
	}
	p.want(t, 1, "cluster.crds", "doctor")
	p.want(t, 2, "hearth start is of a single machine", "start", "hello")
	p.want(t, 2, "use one or the other", "--run", "/nowhere", "list")
	p.want(t, 3, "does not answer", "--kubeconfig", unreachable(t), "list")
}

// unreachable is a kubeconfig whose server has gone.
func unreachable(t *testing.T) string {
	web := httptest.NewServer(nil)
	web.Close()
	file := filepath.Join(t.TempDir(), "config")
	text := "apiVersion: v1\nkind: Config\ncurrent-context: gone\ncontexts: [{name: gone, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: \"" +
		web.URL + "\"}}]\nusers: [{name: u, user: {}}]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestWhichDeployment goes by flags and, without any, by what there is.
func TestWhichDeployment(t *testing.T) {
	f, c := newFake(t), newCluster(t)
	run := func(env map[string]string, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		cli.ExecEnv(t.Context(), "", env, args, strings.NewReader(""), &out, &errs)
		return out.String() + errs.String()
	}
	none := map[string]string{}
	t.Setenv("KUBECONFIG", c.kubeconfig)
	for _, each := range []struct {
		env  map[string]string
		args []string
		want string
	}{
		{none, []string{"status"}, "Cluster of context test"},
		{none, []string{"status", "--run", f.run}, "Deployment test is up"},
		{map[string]string{"HEARTH_RUN": f.run}, []string{"status"}, "Deployment test is up"},
		{map[string]string{"HEARTH_RUN": f.run}, []string{"status", "--context", "test"}, "Cluster of context test"},
		{map[string]string{"HEARTH_CONTEXT": "test"}, []string{"status", "--run", f.run}, "Deployment test is up"},
		{map[string]string{"HEARTH_CONTEXT": "test", "HEARTH_RUN": f.run}, []string{"status"}, "use one or the other"},
		{none, []string{"status", "--namespace", "mine"}, "functions in namespace mine"},
		{none, []string{"status", "--context", "none"}, `context "none" does not exist`},
	} {
		if got := run(each.env, each.args...); !strings.Contains(got, each.want) {
			t.Errorf("%v %q: %q, want %q", each.env, each.args, got, each.want)
		}
	}
	t.Setenv("KUBECONFIG", "/nowhere")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if got := run(none, "status"); !strings.Contains(got, "no deployment is up in /run/hearth") {
		t.Errorf("nothing at all: %q", got)
	}
}

func TestPlugin(t *testing.T) {
	c := newCluster(t)
	t.Setenv("KUBECONFIG", c.kubeconfig)
	run := func(args ...string) string {
		t.Helper()
		var out bytes.Buffer
		cli.ExecEnv(t.Context(), "/usr/bin/kubectl-hearth", nil, args, strings.NewReader(""), &out, &out)
		return out.String()
	}
	help := run("--help")
	if !strings.Contains(help, "\n  kubectl hearth deploy hello") || !strings.Contains(help, "kubectl hearth [command]") || strings.Contains(help, "sudo") {
		t.Errorf("help: %s", help)
	}
	t.Setenv("KUBECONFIG", "/nowhere")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if got := run("status"); !strings.HasPrefix(got, "hearth: no cluster to talk to: ") {
		t.Errorf("without a cluster: %q", got)
	}
	t.Setenv("KUBECONFIG", c.kubeconfig)
	if got := run("get", "other"); !strings.Contains(got, "see `kubectl hearth list`") {
		t.Errorf("%q", got)
	}
	if got := run("up"); !strings.Contains(got, "kubectl hearth up is of a single machine") {
		t.Errorf("%q", got)
	}
	var out bytes.Buffer
	cli.ExecEnv(t.Context(), "/usr/bin/kubectl_complete-hearth", nil, []string{"inst"}, strings.NewReader(""), &out, io.Discard)
	if !strings.Contains(out.String(), "install\t") {
		t.Errorf("completion: %q", out.String())
	}
}

func TestInstall(t *testing.T) {
	c := newCluster(t)
	p := place{[]string{"--kubeconfig", c.kubeconfig}}
	p.want(t, 2, "--registry is missing", "install")
	p.want(t, 2, "want HOST[:PORT][/PATH]", "install", "--registry", "http://r")
	p.want(t, 2, "use print", "install", "--registry", "r:1", "--dry-run", "client")
	p.want(t, 2, "another one wants an overlay", "install", "--registry", "r:1", "-n", "mine")
	p.want(t, 1, "make the images of", "install", "--registry", "r:1", "--push", "--programs", t.TempDir())
	out := p.want(t, 0, "r:1/hearth/gateway:v9", "install", "--registry", "r:1", "--tag", "v9", "--dry-run=print")
	if !strings.Contains(out, "registry: r:1") || strings.Contains(out, "hearth/gateway:dev") || len(c.Writes()) > 0 {
		t.Errorf("writes %q", c.Writes())
	}
	c.OnWrite = func(u *unstructured.Unstructured) {
		u.Object["status"] = map[string]any{
			"observedGeneration": u.GetGeneration(), "desiredNumberScheduled": int64(1), "updatedNumberScheduled": int64(1), "numberReady": int64(1), "replicas": int64(2),
			"updatedReplicas": int64(2), "availableReplicas": int64(2), "conditions": []any{map[string]any{"type": "Established", "status": "True"}},
		}
	}
	p.want(t, 0, "applying Namespace hearth-system", "install", "--registry", "r:1", "--tag", "v9")
	for _, path := range c.Paths() { // what controllers would end
		if strings.Contains(path, "/pods/") {
			c.Remove(path)
		}
	}
	p.want(t, 0, "Hearth is gone from the cluster.", "uninstall", "--all")
	for _, path := range c.Paths() {
		t.Errorf("leaves %s", path)
	}
	p.want(t, 0, "Hearth is gone from the cluster.", "uninstall", "--all")
}
