package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	"github.com/hearth-serverless/hearth/deploy"
	"github.com/hearth-serverless/hearth/test/cluster"
	"github.com/hearth-serverless/hearth/test/e2e"
)

// TestE2E is Hearth on a real cluster, from its installation to its removal, as `make e2e` runs it. -short makes outages shorter.
func TestE2E(t *testing.T) {
	cluster.Skip(t)
	b := newBed(t)
	for _, part := range []struct {
		name string
		test func(*bed, *testing.T)
	}{
		{"FunctionFromZero", (*bed).testFromZero},
		{"APIServerAway", (*bed).testAPIServerAway},
		{"LeaderKilled", (*bed).testLeaderKilled},
		{"RollingUpgrade", (*bed).testUpgrade},
		{"NodeKilled", (*bed).testNodeKilled},
		{"LeadersNodeKilled", (*bed).testLeadersNodeKilled},
		{"Observed", (*bed).testObserved},
		{"Rights", (*bed).testRights},
		{"DeleteEverything", (*bed).testDelete},
	} {
		begun := time.Now()
		ok := t.Run(part.name, func(t *testing.T) { part.test(b, t) })
		t.Logf("%s took %v", part.name, time.Since(begun).Round(time.Second))
		if !ok && part.name == "FunctionFromZero" {
			return // the rest builds on what it has applied
		}
	}
}

// A Function that is applied at zero is served by an Instance that waited before, whose pod becomes the Function's.
func (b *bed) testFromZero(t *testing.T) {
	b.apply(t, object("Runtime", "native", map[string]any{"image": b.push(t, "runtime-native")}))
	b.apply(t,
		object("WarmPool", "native", map[string]any{"runtime": "native", "size": 6, "resources": map[string]any{"cpu": "10m", "memory": "16Mi"}}),
		object("WarmPool", "sandboxes", map[string]any{"size": 2, "images": []string{b.image}, "resources": map[string]any{"cpu": "10m", "memory": "16Mi"}}))
	b.deployCode(t)
	b.kubectl(t, "create", "secret", "generic", "keys", "-n", namespace, "--from-literal=api=secret-of-code")
	b.apply(t,
		object("Function", "code", map[string]any{
			"runtime": "native", "code": b.code, "scaling": lasting, "resources": map[string]any{"cpu": "20m", "memory": "48Mi"},
			"secrets": []any{map[string]any{"name": "api-key", "secretKeyRef": map[string]any{"name": "keys", "key": "api"}}},
		}),
		object("Function", "thawed", map[string]any{
			"runtime": "native", "code": b.code, "scaling": map[string]any{"max": 1, "window": "1s", "grace": "0s", "frozen": 1},
		}),
		object("Function", "image", map[string]any{"image": b.image, "scaling": lasting}))
	b.settle(t)
	for function, path := range map[string]string{"code": "?line=said-by-code", "image": "log?line=said-by-image"} {
		warm := b.instances(t, crd.LabelPool)
		_, took, err := timed(t.Context(), b.url(function)+path)
		if err != nil {
			t.Errorf("%s: %v", function, err)
			continue
		}
		t.Logf("%s: its first answer after %v", function, took.Round(time.Millisecond/10))
		pod := b.podOf(t, function)
		if _, ok := warm[string(pod.UID)]; !ok {
			t.Errorf("%s runs in pod %s, which did not wait before", function, pod.Name)
		}
		if owner := pod.OwnerReferences; len(owner) != 1 || owner[0].Kind != "Revision" || !strings.HasPrefix(owner[0].Name, function+"-") ||
			pod.Labels[crd.LabelPool] != "" || pod.Labels[crd.LabelRevision] != owner[0].Name {
			t.Errorf("the pod of %s has the labels %v and the owners %v", function, pod.Labels, owner)
		}
		await(t, "the Function's line in kubectl logs", func(ctx context.Context) error {
			out, err := b.run(ctx, nil, b.tool, "logs", "-n", namespace, pod.Name)
			if err == nil && !strings.Contains(out, "said-by-"+function) {
				err = fmt.Errorf("got %q", out)
			}
			return err
		})
		if function == "code" {
			b.wantsResources(t, pod.Name, "48Mi")
			if got := b.kubectl(t, "exec", "-n", namespace, pod.Name, "--", "/workspace/main", "say", "hello"); got != "hello\n" {
				t.Errorf("kubectl exec: got %q", got)
			}
		}
	}
	b.thaws(t)
	b.refused(t)
}

// wantsResources waits until a pod requests what its Function was promised: it was made with what its WarmPool has.
func (b *bed) wantsResources(t *testing.T, pod, memory string) {
	t.Helper()
	await(t, "the pod's resources", func(ctx context.Context) error {
		var p corev1.Pod
		if err := b.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: pod}, &p); err != nil {
			return err
		}
		if got := p.Spec.Containers[0].Resources.Requests.Memory().String(); got != memory {
			return fmt.Errorf("it requests %s of memory, want %s", got, memory)
		}
		return nil
	})
}

// thaws asks a Function that was at zero once more, and wants the same process to answer.
func (b *bed) thaws(t *testing.T) {
	t.Helper()
	first, _, err := timed(t.Context(), b.url("thawed"))
	if err != nil {
		t.Fatal(err)
	}
	b.awaitZero(t.Context(), "thawed")
	second, took, err := timed(t.Context(), b.url("thawed"))
	if err != nil || second != first {
		t.Errorf("a Function that was at zero is another process: %q, before %q (%v)", second, first, err)
	}
	t.Logf("thawed: its answer after %v", took.Round(time.Millisecond/10))
}

// refused applies what is wrong, and wants to be told what.
func (b *bed) refused(t *testing.T) {
	t.Helper()
	for want, o := range map[string]map[string]any{
		"either an image, or a runtime with code": object("Function", "wrong", map[string]any{"image": b.image, "runtime": "native"}),
		"spec.size": object("WarmPool", "wrong", map[string]any{"size": -1}),
	} {
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.run(t.Context(), text, b.tool, "apply", "-f", "-"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want a refusal with %q: %v", want, err)
		}
	}
}

// deployCode deploys the program of testdata as a user does, by `hearth deploy`.
func (b *bed) deployCode(t *testing.T) {
	t.Helper()
	folder := t.TempDir()
	compile := exec.Command("go", "build", "-o", filepath.Join(folder, "main"), "./testdata/function")
	compile.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("compile the Function: %v\n%s", err, out)
	}
	b.hearth(t, "deploy", "deployed", folder, "--runtime", "native", "--handler", "main", "--registry", b.registry)
	var made struct {
		Spec struct{ Code map[string]any }
	}
	if err := json.Unmarshal([]byte(b.kubectl(t, "get", "function", "deployed", "-n", namespace, "-o", "json")), &made); err != nil {
		t.Fatal(err)
	}
	b.code = made.Spec.Code
	if _, _, err := timed(t.Context(), b.url("deployed")); err != nil {
		t.Errorf("what hearth has deployed: %v", err)
	}
	b.kubectl(t, "delete", "function", "deployed", "-n", namespace)
}

// What the dashboards and alerts of deploy/ ask, a Prometheus that has scraped all of this can answer.
func (b *bed) testObserved(t *testing.T) {
	if err := e2e.RunQueries(t.Context(), b.prometheus.URL, time.Since(b.began)); err != nil {
		t.Error(err)
	}
}

// The daemons may what they do, and nothing else.
func (b *bed) testRights(t *testing.T) {
	b.needsMachines(t)
	objects, err := deploy.Objects(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, account := range []string{"hearth-poolmanager", "hearth-nodeagent", "hearth-gateway"} {
		log, err := os.Open(b.cluster.AuditLog())
		if err != nil {
			t.Fatal(err)
		}
		unused, missing, err := e2e.CompareRights(objects, system, account, log)
		_ = log.Close()
		if err != nil {
			t.Error(err)
		}
		for _, r := range missing {
			t.Errorf("%s asks for what it may not: %s", account, r)
		}
		for _, r := range unused {
			if unexercised[r] == "" {
				t.Errorf("%s never asks for what it may: %s", account, r)
			}
		}
	}
}

// unexercised are rights for what does not happen here, and why they are needed.
var unexercised = map[string]string{
	"list nodes":                                             fallback,
	"list pods in hearth":                                    fallback,
	"list pods in hearth-system":                             fallback,
	"list warmpools.hearth.dev in hearth":                    fallback,
	"get runtimes.hearth.dev in hearth":                      "an object that the cache does not have is looked up",
	"get warmpools.hearth.dev in hearth":                     "an object that the cache does not have is looked up",
	"get pods in hearth":                                     "what a pod that does not start waits for",
	"patch nodes":                                            "nodes that start with the taint hearth.dev/nodeagent-not-ready",
	"delete revisions.hearth.dev in hearth":                  "a Function's eleventh Revision",
	"update secrets hearth-ca in hearth-system":              renewal,
	"update secrets hearth-tls-admin in hearth-system":       renewal,
	"update secrets hearth-tls-gateway in hearth-system":     renewal,
	"update secrets hearth-tls-nodeagent in hearth-system":   renewal,
	"update secrets hearth-tls-poolmanager in hearth-system": renewal,
}

const (
	fallback = "API servers that cannot stream a list"
	renewal  = "certificates that are about to expire"
)

// Whatever is deleted first, nothing stays; and a node from which Hearth was removed is what it was.
func (b *bed) testDelete(t *testing.T) {
	b.kubectl(t, "delete", "runtimes", "--all", "-n", namespace)
	b.kubectl(t, "delete", "functions", "--all", "-n", namespace)
	b.kubectl(t, "delete", "warmpools", "--all", "-n", namespace)
	b.kubectl(t, "delete", "secret", "keys", "-n", namespace)
	await(t, "an empty namespace", func(ctx context.Context) error {
		out, err := b.run(ctx, nil, b.tool, "get", "pods,secrets,functions,revisions,runtimes,warmpools", "-n", namespace, "-o", "name")
		if err == nil && out != "" {
			err = fmt.Errorf("there are still\n%s", out)
		}
		return err
	})
	b.needsMachines(t)
	b.withRestarts(t, func() { b.hearth(t, "uninstall", "--all") })
	for what, args := range map[string][]string{
		"kinds":      {"get", "customresourcedefinitions", "-o", "name"},
		"namespaces": {"get", "namespaces", "-o", "name"},
		"rights":     {"get", "clusterroles,clusterrolebindings,priorityclasses", "-o", "name"},
	} {
		if out := b.kubectl(t, args...); strings.Contains(out, "hearth") {
			t.Errorf("%s that stay:\n%s", what, out)
		}
	}
	for _, n := range b.cluster.Nodes() {
		b.wantsClean(t, n)
	}
}

// wantsClean wants a node to be as it was before Hearth came.
func (b *bed) wantsClean(t *testing.T, n *cluster.Node) {
	t.Helper()
	now := containerdFiles(t, n)
	for name, text := range b.before[n.Name()] {
		if now[name] != text {
			t.Errorf("%s: %s is not what it was; it is now\n%s", n.Name(), name, now[name])
		}
		delete(now, name)
	}
	for name := range now {
		t.Errorf("%s: %s was not there before", n.Name(), name)
	}
	for _, dir := range []string{"run/hearth", "var/lib/hearth"} {
		entries, err := os.ReadDir(filepath.Join(n.Dir(), dir))
		if err != nil && !os.IsNotExist(err) || len(entries) > 0 {
			t.Errorf("%s: /%s has %v (%v)", n.Name(), dir, entries, err)
		}
	}
	cmd, err := n.Command(t.Context(), "cat", "/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(out) {
		if bytes.Contains(line, []byte("/var/lib/hearth")) || bytes.Contains(line, []byte("/run/hearth")) {
			t.Errorf("%s: a mount stays: %s", n.Name(), line)
		}
	}
}

// containerdFiles are all files of a node's containerd configuration.
func containerdFiles(t *testing.T, n *cluster.Node) map[string]string {
	t.Helper()
	root := filepath.Join(n.Dir(), "etc/containerd")
	out := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		out[strings.TrimPrefix(path, root)] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
