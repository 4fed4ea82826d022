package e2e_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/test/cluster"
)

// away is how long the API server is.
func away() time.Duration {
	if testing.Short() {
		return 20 * time.Second
	}
	return time.Minute
}

// Without an API server what is warm serves, and what is at zero starts from the pool.
func (b *bed) testAPIServerAway(t *testing.T) {
	b.needsMachines(t)
	objects, urls := b.functions("away", 4, lasting)
	b.apply(t, objects...)
	defer b.remove(t, objects)
	b.settle(t)
	if _, _, err := timed(t.Context(), urls[0]); err != nil {
		t.Fatal(err)
	}
	warm := startLoad(t, 50*time.Millisecond, urls[0])
	if err := b.cluster.StopAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, url := range urls[1:] {
		host.Pause(t.Context(), away()/time.Duration(len(urls)))
		_, took, err := timed(t.Context(), url)
		if err != nil {
			t.Errorf("from zero, without an API server: %v", err)
		}
		t.Logf("from zero, without an API server: answered after %v", took.Round(time.Millisecond/10))
	}
	host.Pause(t.Context(), away()/time.Duration(len(urls)))
	if err := b.cluster.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.settle(t)
	warm.end(t, int(away()/(100*time.Millisecond)))
	for _, o := range objects[1:] {
		b.podOf(t, o["metadata"].(map[string]any)["name"].(string)) // labelled in the end
	}
}

// served is one Function's answers: the names of its processes, in the order in which they were seen.
type served struct {
	claims, doubled int
	slowest         time.Duration
	faults          []string
}

// churn asks a Function again and again, one request at a time, each when it is at zero again, or at least should be.
func (b *bed) churn(ctx context.Context, function string) (s served) {
	before := map[string]bool{}
	last := ""
	for ctx.Err() == nil {
		name, took, err := timed(context.WithoutCancel(ctx), b.url(function))
		s.slowest = max(s.slowest, took)
		switch {
		case err != nil:
			s.faults = append(s.faults, fmt.Sprintf("%s: %v", time.Now().Format("15:04:05.000"), err))
		case name != last && before[name]:
			s.doubled++ // an Instance serves that another has followed
		case name != last:
			s.claims++
		}
		before[name], last = true, name
		b.awaitZero(ctx, function)
	}
	return s
}

// awaitZero waits until a Function has no Instance, for 15 s at most.
func (b *bed) awaitZero(ctx context.Context, function string) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	host.Pause(ctx, time.Second) // until the API server has been told that there is one
	for host.Pause(ctx, 200*time.Millisecond) {
		var f crd.Function
		err := b.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: function}, &f)
		if err == nil && f.Status.Ready == 0 && f.Status.Starting == 0 && f.Status.Desired == 0 {
			return
		}
	}
}

// While Functions are claimed all the time the leader is killed. Another leads within seconds, and nobody but the slowest notices.
func (b *bed) testLeaderKilled(t *testing.T) {
	b.needsMachines(t)
	objects, urls := b.functions("led", 8, brief)
	b.apply(t, objects...)
	defer b.remove(t, objects)
	b.settle(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	all := make([]served, len(urls))
	var asking sync.WaitGroup
	for i := range urls {
		asking.Go(func() { all[i] = b.churn(ctx, fmt.Sprintf("led-%d", i)) })
	}
	host.Pause(t.Context(), 20*time.Second)
	took := b.killLeader(t)
	t.Logf("another led after %v", took.Round(10*time.Millisecond))
	if took > takeOver {
		t.Errorf("the take-over took %v, more than %v", took, takeOver)
	}
	host.Pause(t.Context(), 20*time.Second)
	stop()
	asking.Wait()
	claims, slowest := 0, time.Duration(0)
	for i, s := range all {
		claims += s.claims
		slowest = max(slowest, s.slowest)
		if s.doubled > 0 {
			t.Errorf("%s: %d answers of an Instance that another had followed", urls[i], s.doubled)
		}
		for _, f := range s.faults {
			t.Errorf("%s: %s", urls[i], f)
		}
	}
	t.Logf("%d claims, the slowest request took %v", claims, slowest.Round(time.Millisecond))
	if claims < 2*len(urls) {
		t.Errorf("only %d claims were made: they say nothing", claims)
	}
}

const takeOver = 5 * time.Second

// killLeader kills the leading poolmanager's process, and returns how long it took until another held the Lease.
func (b *bed) killLeader(t *testing.T) time.Duration {
	t.Helper()
	identity, pod, err := b.leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimPrefix(pod.Status.ContainerStatuses[0].ContainerID, "containerd://")
	cmd, err := b.cluster.Node(pod.Spec.NodeName).Command(t.Context(), "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", id)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("kill %s: %v\n%s", identity, err, out)
	}
	killed := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		now, err := b.holder(ctx)
		if err == nil && now != "" && now != identity {
			return time.Since(killed)
		}
		if !host.Pause(ctx, 50*time.Millisecond) {
			t.Fatalf("nobody leads after %s was killed: %q %v", identity, now, err)
		}
	}
}

// All daemons are replaced while requests come. None fails, and what runs or waits does not notice.
func (b *bed) testUpgrade(t *testing.T) {
	objects, urls := b.functions("upgrade", 4, lasting)
	b.apply(t, objects...)
	defer b.remove(t, objects)
	for _, url := range urls {
		if _, _, err := timed(t.Context(), url); err != nil {
			t.Fatal(err)
		}
	}
	b.settle(t)
	before := b.instances(t, crd.LabelInstance)
	requests := startLoad(t, 50*time.Millisecond, urls...)
	for _, daemon := range []string{"deployment/poolmanager", "daemonset/nodeagent", "deployment/gateway"} {
		begun := time.Now()
		b.kubectl(t, "rollout", "restart", "-n", system, daemon)
		b.kubectl(t, "rollout", "status", "-n", system, daemon, "--timeout", patience.String())
		t.Logf("%s was replaced in %v", daemon, time.Since(begun).Round(time.Second))
	}
	host.Pause(t.Context(), 10*time.Second) // the last gateway goes on serving for a while
	requests.end(t, 200)
	after := b.instances(t, crd.LabelInstance)
	for uid, pod := range before {
		if _, ok := after[uid]; !ok {
			t.Errorf("pod %s (%v) was replaced", pod.Name, pod.Labels)
		}
	}
	t.Logf("%d pods of Instances stayed", len(before))
}

// A node vanishes. What was on it serves elsewhere, and what is on the other does not notice.
func (b *bed) testNodeKilled(t *testing.T) {
	b.needsMachines(t)
	b.settle(t)
	_, leader, err := b.leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.killNode(t, b.other(leader.Spec.NodeName))
}

// So they do from the node of the poolmanager that leads, whose successor has to notice both.
func (b *bed) testLeadersNodeKilled(t *testing.T) {
	b.needsMachines(t)
	b.settle(t)
	_, leader, err := b.leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.killNode(t, b.cluster.Node(leader.Spec.NodeName))
}

func (b *bed) killNode(t *testing.T, victim *cluster.Node) {
	t.Helper()
	gateway := b.gatewayOn(t, b.other(victim.Name()).Name())
	objects, _ := b.functions("moved", 8, lasting)
	b.apply(t, objects...)
	defer b.remove(t, objects)
	var lost, kept []string
	for _, o := range objects {
		name := o["metadata"].(map[string]any)["name"].(string)
		url := gateway + "/fn/" + name + "/"
		if _, _, err := timed(t.Context(), url); err != nil {
			t.Fatal(err)
		}
		if b.podOf(t, name).Spec.NodeName == victim.Name() {
			lost = append(lost, url)
		} else {
			kept = append(kept, url)
		}
	}
	if len(lost) == 0 || len(kept) == 0 {
		t.Fatalf("%d Functions are on %s and %d on the other: want some on both", len(lost), victim.Name(), len(kept))
	}
	healthy := startLoad(t, 50*time.Millisecond, kept...)
	host.Pause(t.Context(), 2*time.Second)
	if err := victim.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	var asking sync.WaitGroup
	for _, url := range lost {
		asking.Go(func() {
			_, took, err := timed(t.Context(), url)
			if err != nil || took > moveTime {
				t.Errorf("%s, which was on %s: answered after %v, want %v at most (%v)", url, victim.Name(), took, moveTime, err)
			}
			t.Logf("%s moved: answered after %v", url, took.Round(time.Millisecond))
		})
	}
	asking.Wait()
	host.Pause(t.Context(), 10*time.Second)
	healthy.end(t, 100)
	if err := victim.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.settle(t)
}

// moveTime is how long the next request to what was on a node that has vanished may take. poolmanager withdraws it after some 2 s, which
// ends attempts to connect to it; if poolmanager has vanished as well, another leads after 3 to 4.
const moveTime = 5 * time.Second

// other is a node that is not the one of that name.
func (b *bed) other(name string) *cluster.Node {
	for _, n := range b.cluster.Nodes() {
		if n.Name() != name {
			return n
		}
	}
	return nil
}

// gatewayOn is the URL of the gateway on a node: a Service would send requests to the dead one's until Kubernetes calls it dead.
func (b *bed) gatewayOn(t *testing.T, node string) string {
	t.Helper()
	pods, err := b.pods(t.Context(), system, client.MatchingLabels{"app.kubernetes.io/component": "gateway"})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if p.Spec.NodeName == node && p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning {
			return "http://" + p.Status.PodIP + ":8080"
		}
	}
	t.Fatalf("no gateway runs on %s", node)
	return ""
}
