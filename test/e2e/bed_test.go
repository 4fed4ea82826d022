package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/internal/kube"
	"github.com/hearth-serverless/hearth/internal/register"
	"github.com/hearth-serverless/hearth/test/cluster"
	"github.com/hearth-serverless/hearth/test/e2e"
)

const (
	namespace = "hearth"
	system    = "hearth-system"
	cached    = "../../.cache"
	bin       = "../../bin"
	// patience is how long anything may take of which no bound is promised, on a machine that does much else.
	patience = 3 * time.Minute
)

// bed is a cluster on which Hearth is, as its user has installed it.
type bed struct {
	cluster    *cluster.Cluster // nil if $KUBECONFIG names one: then no machine of it is stopped
	kubeconfig string
	registry   string
	tool       string // kubectl
	hosts      string // folder of hosts.toml files
	api        client.Client
	gateway    string // URL of its Service
	code       map[string]any
	image      string

	prometheus *e2e.Prometheus
	began      time.Time
	before     map[string]map[string]string // files of containerd's configuration by node, before Hearth was installed
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{hosts: t.TempDir()}
	b.open(t)
	hosts := fmt.Sprintf("server = \"http://%[1]s\"\n[host.\"http://%[1]s\"]\n  capabilities = [\"pull\", \"resolve\", \"push\"]\n", b.registry)
	err := errors.Join(os.MkdirAll(filepath.Join(b.hosts, b.registry), 0o755),
		os.WriteFile(filepath.Join(b.hosts, b.registry, "hosts.toml"), []byte(hosts), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", b.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1 // what is measured must not wait here
	if b.api, err = client.New(config, client.Options{Scheme: kube.NewScheme()}); err != nil {
		t.Fatal(err)
	}
	if b.cluster != nil {
		b.before = map[string]map[string]string{}
		for _, n := range b.cluster.Nodes() {
			b.before[n.Name()] = containerdFiles(t, n)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			b.tell(t)
		}
	})
	begun := time.Now()
	b.withRestarts(t, func() { b.hearth(t, "install", "--push", "--registry", b.registry) })
	t.Logf("installed in %v", time.Since(begun).Round(100*time.Millisecond))
	b.image = b.push(t, "go")
	b.findGateway(t)
	b.watch(t)
	return b
}

// open starts a cluster, or takes the one that $KUBECONFIG names.
func (b *bed) open(t *testing.T) {
	t.Helper()
	if b.kubeconfig = os.Getenv("KUBECONFIG"); b.kubeconfig != "" {
		if b.registry = os.Getenv("HEARTH_REGISTRY"); b.registry == "" {
			t.Fatal("name in HEARTH_REGISTRY a registry that this machine can push to and the cluster's nodes pull from")
		}
		var err error
		if b.tool, err = exec.LookPath("kubectl"); err != nil {
			t.Fatal(err)
		}
		return
	}
	dir, err := os.MkdirTemp("/tmp", "hearth-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.Down(context.Background(), dir); err != nil && !errors.Is(err, cluster.ErrDown) {
			t.Error(err)
		}
		_ = os.RemoveAll(dir)
	})
	if b.cluster, err = cluster.Start(t.Context(), cluster.Config{Dir: dir, Progress: func(line string) { t.Log(line) }}); err != nil {
		t.Fatal(err)
	}
	b.kubeconfig, b.registry, b.tool = b.cluster.Kubeconfig(), b.cluster.Registry(), b.cluster.Tool("kubectl")
}

// needsMachines skips what stops machines where they are not ours.
func (b *bed) needsMachines(t *testing.T) {
	t.Helper()
	if b.cluster == nil {
		t.Skip("it stops machines, or changes all of them, and those of $KUBECONFIG are somebody's")
	}
}

// withRestarts does what changes containerd's configuration, and meanwhile what docs/INSTALL.md asks of an administrator whose nodes have
// no systemd: where a pod ends with 4, containerd has to be restarted by hand.
func (b *bed) withRestarts(t *testing.T, change func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	if b.cluster != nil {
		watching.Go(func() {
			for restarted := map[string]bool{}; host.Pause(ctx, time.Second); {
				pods, err := b.pods(ctx, system, client.MatchingLabels{})
				if err != nil {
					continue // it is not there yet, or gone
				}
				for _, p := range pods {
					if name := p.Spec.NodeName; endedForRestart(p) && !restarted[name] {
						restarted[name] = true
						t.Logf("%s of %s wants containerd to be restarted by hand: %v", p.Name, name, b.cluster.Node(name).RestartContainerd(ctx))
					}
				}
			}
		})
	}
	change()
}

func endedForRestart(p corev1.Pod) bool {
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		for _, state := range []corev1.ContainerState{s.State, s.LastTerminationState} {
			if state.Terminated != nil && state.Terminated.ExitCode == register.ExitRestart {
				return true
			}
		}
	}
	return false
}

// push uploads a sample image.
func (b *bed) push(t *testing.T, name string) string {
	t.Helper()
	layout, err := images.Build(t.Context(), images.Config{Cache: cached}, name)
	if err != nil {
		t.Fatal(err)
	}
	ref := b.registry + "/" + name + ":1"
	if _, err := images.Push(t.Context(), layout, ref); err != nil {
		t.Fatal(err)
	}
	return ref
}

// findGateway waits until its Service is reached from here: some time goes by until a kube-proxy begins.
func (b *bed) findGateway(t *testing.T) {
	t.Helper()
	var service corev1.Service
	if err := b.api.Get(t.Context(), client.ObjectKey{Namespace: system, Name: "hearth-gateway"}, &service); err != nil {
		t.Fatal(err)
	}
	b.gateway = "http://" + service.Spec.ClusterIP
	await(t, "the gateway's Service", func(ctx context.Context) error {
		_, err := get(ctx, b.gateway+"/fn/none/")
		if err != nil && strings.HasPrefix(err.Error(), "404 ") {
			return nil
		}
		return fmt.Errorf("want 404: %w", err)
	})
}

// watch has a Prometheus look at the daemons from now on.
func (b *bed) watch(t *testing.T) {
	t.Helper()
	p, err := e2e.StartPrometheus(t.Context(), e2e.PrometheusConfig{Cache: cached, Dir: t.TempDir(), Interval: 2 * time.Second,
		Pods: func(ctx context.Context) ([]byte, error) {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			var pods corev1.PodList
			if err := b.api.List(ctx, &pods, client.InNamespace(system)); err != nil {
				return nil, err
			}
			return json.Marshal(pods)
		}})
	if err != nil {
		t.Fatal(err)
	}
	b.prometheus, b.began = p, time.Now()
	t.Cleanup(func() { _ = p.Close() }) // its last list fails when Hearth has gone
}

func (b *bed) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+b.kubeconfig, "HEARTH_HOSTS_DIR="+b.hosts)
	return cmd
}

// run runs a program as the cluster's administrator and returns what it prints.
func (b *bed) run(ctx context.Context, input []byte, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	cmd := b.command(ctx, program, args...)
	cmd.Stdin = bytes.NewReader(input)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(program), strings.Join(args, " "), err, &errs, &out)
	}
	return out.String(), nil
}

func (b *bed) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := b.run(t.Context(), nil, b.tool, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (b *bed) hearth(t *testing.T, args ...string) {
	t.Helper()
	if _, err := b.run(t.Context(), nil, filepath.Join(bin, "hearth"), args...); err != nil {
		t.Fatal(err)
	}
}

// apply has kubectl apply objects, and waits until they are Ready.
func (b *bed) apply(t *testing.T, objects ...map[string]any) {
	t.Helper()
	list, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.run(t.Context(), list, b.tool, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	args := []string{"wait", "-n", namespace, "--for=condition=Ready", "--timeout", patience.String()}
	for _, o := range objects {
		args = append(args, strings.ToLower(o["kind"].(string))+"/"+o["metadata"].(map[string]any)["name"].(string))
	}
	b.kubectl(t, args...)
}

// object is one of Hearth's.
func object(kind, name string, spec map[string]any) map[string]any {
	return map[string]any{
		"apiVersion": "hearth.dev/v1alpha1", "kind": kind, "metadata": map[string]any{"name": name, "namespace": namespace}, "spec": spec,
	}
}

// brief is a scaling with which a Function is at zero a moment after its last request.
var brief = map[string]any{"max": 1, "window": "1s", "grace": "0s", "frozen": 0}

// lasting is one with which a Function that was asked stays.
var lasting = map[string]any{"max": 1, "window": "10m", "grace": "10m"}

// functions are Functions prefix-0, prefix-1, … of the code that was deployed.
func (b *bed) functions(prefix string, n int, scaling map[string]any) (objects []map[string]any, urls []string) {
	for i := range n {
		name := fmt.Sprintf("%s-%d", prefix, i)
		objects = append(objects, object("Function", name, map[string]any{"runtime": "native", "code": b.code, "scaling": scaling}))
		urls = append(urls, b.url(name))
	}
	return objects, urls
}

func (b *bed) url(function string) string { return b.gateway + "/fn/" + function + "/" }

// remove deletes Functions.
func (b *bed) remove(t *testing.T, objects []map[string]any) {
	t.Helper()
	args := []string{"delete", "-n", namespace, "--wait=false"}
	for _, o := range objects {
		args = append(args, "function/"+o["metadata"].(map[string]any)["name"].(string))
	}
	b.kubectl(t, args...)
}

// pods are those of a namespace with a label.
func (b *bed) pods(ctx context.Context, in string, labels client.ListOption) ([]corev1.Pod, error) {
	var list corev1.PodList
	err := b.api.List(ctx, &list, client.InNamespace(in), labels)
	return list.Items, err
}

// instances are the pods of a namespace's Instances, by UID, that wait or serve.
func (b *bed) instances(t *testing.T, label string) map[string]corev1.Pod {
	t.Helper()
	pods, err := b.pods(t.Context(), namespace, client.HasLabels{label})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]corev1.Pod{}
	for _, p := range pods {
		if p.DeletionTimestamp == nil {
			out[string(p.UID)] = p
		}
	}
	return out
}

// podOf waits until a Function's pod says whose it is.
func (b *bed) podOf(t *testing.T, function string) (pod corev1.Pod) {
	t.Helper()
	await(t, "the pod of "+function, func(ctx context.Context) error {
		pods, err := b.pods(ctx, namespace, client.MatchingLabels{crd.LabelFunction: function})
		if err == nil && len(pods) != 1 {
			err = fmt.Errorf("%d pods are labelled as the Function's", len(pods))
		}
		if err == nil {
			pod = pods[0]
		}
		return err
	})
	return pod
}

// leader is the pod of the poolmanager that holds the Lease, and what the Lease calls it.
func (b *bed) leader(ctx context.Context) (identity string, pod corev1.Pod, err error) {
	if identity, err = b.holder(ctx); err != nil {
		return "", pod, err
	}
	pods, err := b.pods(ctx, system, client.MatchingLabels{"app.kubernetes.io/component": "poolmanager"})
	if err != nil {
		return "", pod, err
	}
	for _, p := range pods {
		if strings.HasPrefix(identity, p.Name+"-") {
			return identity, p, nil
		}
	}
	return "", pod, fmt.Errorf("%q, which holds the Lease, is no pod", identity)
}

func (b *bed) holder(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var lease coordinationv1.Lease
	err := b.api.Get(ctx, client.ObjectKey{Namespace: system, Name: kube.LeaseName}, &lease)
	if err != nil || lease.Spec.HolderIdentity == nil {
		return "", err
	}
	return *lease.Spec.HolderIdentity, nil
}

// settle waits until the daemons are all ready and every WarmPool is full.
func (b *bed) settle(t *testing.T) {
	t.Helper()
	for _, what := range []string{"daemonset/nodeagent", "deployment/poolmanager", "deployment/gateway"} {
		b.kubectl(t, "rollout", "status", "-n", system, what, "--timeout", patience.String())
	}
	await(t, "full WarmPools", func(ctx context.Context) error {
		var pools crd.WarmPoolList
		if err := b.api.List(ctx, &pools, client.InNamespace(namespace)); err != nil {
			return err
		}
		for _, p := range pools.Items {
			if b.cluster != nil && int(p.Status.Nodes) != len(b.cluster.Nodes()) || p.Status.Warm < p.Status.Desired {
				return fmt.Errorf("%s has %d warm Instances of %d, on %d nodes", p.Name, p.Status.Warm, p.Status.Desired, p.Status.Nodes)
			}
		}
		return nil
	})
}

// tell writes down what helps to see why a test failed.
func (b *bed) tell(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"}, {"get", "hearth", "-n", namespace},
		{"logs", "-n", system, "-l", "app.kubernetes.io/component=poolmanager", "--tail=25", "--prefix"},
		{"logs", "-n", system, "-l", "app.kubernetes.io/component=nodeagent", "-c", "nodeagent", "--tail=25", "--prefix"},
		{"logs", "-n", system, "-l", "app.kubernetes.io/component=gateway", "--tail=15", "--prefix"},
	} {
		out, err := b.run(ctx, nil, b.tool, args...)
		t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// await tries until there is no error.
func await(t *testing.T, what string, try func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		attempt, done := context.WithTimeout(ctx, 10*time.Second)
		err := try(attempt)
		done()
		if err == nil {
			return
		}
		if !host.Pause(ctx, 200*time.Millisecond) {
			t.Fatalf("await %s: %v", what, err)
		}
	}
}
