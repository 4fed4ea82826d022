package kube

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// within is how long anything may take here before it is taken for something that never comes.
const within = 2 * time.Minute

// apiServer starts a real one with our definitions, and returns it with a client.
func apiServer(t *testing.T) (*envtest.Environment, client.Client) {
	t.Helper()
	programs, err := filepath.Abs("../../.cache/tools/kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"etcd", "kube-apiserver", "kubectl"} {
		if _, err := os.Stat(filepath.Join(programs, name)); err != nil {
			t.Skipf("needs the Kubernetes programs, see tools/kubernetes: %v", err)
		}
	}
	env := &envtest.Environment{
		BinaryAssetsDirectory: programs, Scheme: kinds(), ErrorIfCRDPathMissing: true, CRDDirectoryPaths: []string{"../../deploy/crds"},
		ControlPlaneStartTimeout: within, ControlPlaneStopTimeout: within,
	}
	config, err := env.Start()
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(config, client.Options{Scheme: kinds()})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}); err != nil {
		t.Fatal(err)
	}
	return env, c
}

// term runs controllers until it is ended.
func term(t *testing.T, env *envtest.Environment, seen cache.Cache, pool *fakePool) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	c := Controllers{Namespace: namespace, Functions: pool, Runtimes: pool, Pools: pool, Logger: slog.New(slog.DiscardHandler),
		URL: func(name string) string { return "http://" + name + ".example" }}
	go func() { done <- c.Run(ctx, env.Config, kinds(), seen) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("controllers: %v", err)
		}
	}
}

func eventually(t *testing.T, what string, holds func(context.Context) bool) {
	t.Helper()
	err := wait.PollUntilContextTimeout(t.Context(), 50*time.Millisecond, within, true, func(ctx context.Context) (bool, error) { return holds(ctx), nil })
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// TestOnAnAPIServer has a real API server's validation, defaults, subresources, watches and printing between kubectl and the controllers.
func TestOnAnAPIServer(t *testing.T) {
	env, api := apiServer(t)
	user, err := env.AddUser(envtest.User{Name: "user", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := user.KubeConfig()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, kubeconfig, 0o600); err != nil {
		t.Fatal(err)
	}
	kubectl := func(input string, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(env.BinaryAssetsDirectory, "kubectl"), append([]string{"--kubeconfig", file, "--namespace", namespace}, args...)...)
		cmd.Stdin = strings.NewReader(input)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(input string, args ...string) string {
		t.Helper()
		out, err := kubectl(input, args...)
		if err != nil {
			t.Fatalf("kubectl %v: %v\n%s", args, err, out)
		}
		return out
	}

	seen, err := cache.New(env.Config, cache.Options{Scheme: kinds(), DefaultNamespaces: map[string]cache.Config{namespace: {}}})
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	go func() { stopped <- seen.Start(ctx) }()
	defer func() {
		stop()
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	}()
	term(t, env, seen, newFakePool())() // the second is the one that counts: it must not stumble over the first
	pool := newFakePool()
	pool.functions["left-over"] = &hearthv1.Function{Name: "left-over"} // that was deleted while nobody led
	defer term(t, env, seen, pool)()

	const docs = `
apiVersion: hearth.dev/v1alpha1
kind: Function
metadata: {name: hello}
spec:
  runtime: python
  code: {package: "r.example/hello@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", handler: main.hello}
  resources: {cpu: 500m, memory: 128Mi}
  secrets: [{name: key, secretKeyRef: {name: keys, key: api}}]
---
apiVersion: hearth.dev/v1alpha1
kind: Runtime
metadata: {name: python}
spec: {image: "r.example/python:1"}
---
apiVersion: hearth.dev/v1alpha1
kind: WarmPool
metadata: {name: all}
spec: {size: 2}
`
	must(docs, "apply", "-f", "-")
	must("", "wait", "--for=condition=Accepted=False", "fn/hello", "--timeout=100s") // there is no Secret yet
	must("", "wait", "--for=condition=Accepted", "wp/all", "--timeout=100s")
	pool.change(func() { pool.pools["all"] = PoolStatus{Nodes: 2, Warm: 4, Desired: 4} })
	must("", "create", "secret", "generic", "keys", "--from-literal=api=open sesame")
	must("", "wait", "--for=condition=Ready", "fn/hello", "rt/python", "wp/all", "--timeout=100s")
	pool.change(func() {
		if got := string(pool.functions["hello"].GetSpec().GetSecrets()["key"]); got != "open sesame" {
			t.Errorf("the pool has %q for a secret", got)
		}
		if got := pool.functions["hello"].GetSpec().GetScaling().GetMax(); got != 10 {
			t.Errorf("the pool has a maximum of %d by default", got)
		}
	})
	eventually(t, "what is left over is deleted", func(context.Context) bool {
		pool.mu.Lock()
		defer pool.mu.Unlock()
		return pool.functions["left-over"] == nil
	})

	for _, c := range []struct {
		args string
		want []string
	}{
		{"get fn", []string{"READY", "REASON", "INSTANCES", "REVISION", "URL", "ScaledToZero", "hello-00001", "http://hello.example"}},
		{"get hearth", []string{"function.hearth.dev/hello", "runtime.hearth.dev/python", "warmpool.hearth.dev/all"}},
		{"describe fn hello", []string{"Handler:", "main.hello", "SecretNotFound", `there is no Secret "keys"`, "Last Transition Time"}},
		{"explain function.spec.scaling.min", []string{"Min Instances are kept ready at all times"}},
		{"explain function.spec", []string{"either image, or runtime and code", "secrets", "writableRoot"}},
	} {
		out := must("", strings.Fields(c.args)...)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("kubectl %s does not say %q:\n%s", c.args, want, out)
			}
		}
	}
	for bad, want := range map[string]string{
		`{image: hello, scaling: {min: 20}}`:     "min is more than max, which is 10 if it is left out",
		`{image: hello, scale: 1}`:               `unknown field "spec.scale"`,
		`{}`:                                     "a function is either an image, or a runtime with code",
		`{image: hello, timeout: for ever}`:      "must be a duration from 0s to 1h",
		`{image: hello, resources: {memory: 0}}`: "must be at least a byte",
	} {
		out, err := kubectl("apiVersion: hearth.dev/v1alpha1\nkind: Function\nmetadata: {name: bad}\nspec: "+bad+"\n", "apply", "-f", "-")
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v, not %q:\n%s", bad, err, want, out)
		}
	}

	rev := &crd.Revision{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "hello-00001"}, Spec: crd.RevisionSpec{Function: "hello", Image: "hello"}}
	if err := api.Create(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	changed := client.RawPatch(types.MergePatchType, []byte(`{"spec":{"image":"other"}}`)) // whatever the controller has written meanwhile
	if err := api.Patch(t.Context(), rev, changed); err == nil || !strings.Contains(err.Error(), "a revision never changes") {
		t.Errorf("a revision was changed: %v", err)
	}

	wp := &crd.WarmPool{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "all"}}
	scale := &autoscalingv1.Scale{Spec: autoscalingv1.ScaleSpec{Replicas: 1}}
	if err := api.SubResource("scale").Update(t.Context(), wp, client.WithSubResourceBody(scale)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pool is scaled", func(ctx context.Context) bool {
		return api.SubResource("scale").Get(ctx, wp, scale) == nil && scale.Status.Replicas == 1 && scale.Status.Selector == "hearth.dev/pool=all"
	})

	// What the pool says comes into the status, and a Secret's change into the pool.
	pool.change(func() {
		pool.functions["hello"].Status = &hearthv1.FunctionStatus{Revision: "hello-00002", Ready: 3, Desired: 3, Reason: "busy"}
	})
	must("", "wait", "--for=jsonpath={.status.ready}=3", "fn/hello", "--timeout=100s")
	must(fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: keys}\nstringData: {api: %q}\n", "changed"), "apply", "-f", "-")
	eventually(t, "the new secret is applied", func(context.Context) bool {
		pool.mu.Lock()
		defer pool.mu.Unlock()
		return string(pool.functions["hello"].GetSpec().GetSecrets()["key"]) == "changed"
	})

	must("", "delete", "rt,fn,wp", "--all", "--timeout=100s")
	eventually(t, "all is gone", func(context.Context) bool {
		pool.mu.Lock()
		defer pool.mu.Unlock()
		return len(pool.functions)+len(pool.runtimes)+len(pool.pools) == 0
	})
}
