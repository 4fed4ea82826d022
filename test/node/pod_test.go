package node_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// shared is the Revision of a Function of a tenant's group.
func (n *instanceNode) shared(function, tenant string) *hearthv1.Revision {
	r := n.revision()
	r.Name, r.Function, r.Tenant, r.Group = function+"-00001", function, tenant, "low"
	r.Resources = &hearthv1.Resources{MemoryBytes: 64 << 20}
	r.Env["WHO"] = function
	return r
}

func (n *instanceNode) join(id, pod, tenant string) error {
	_, err := n.calls.CreateInstance(context.Background(), connect.NewRequest(&hearthv1.CreateInstanceRequest{
		Id: id, Pod: pod, Tenant: tenant, Group: "low",
	}))
	return err
}

// sharePod makes Instances of one pod serve, each the Function fn-ID, and returns their addresses.
func (n *instanceNode) sharePod(ids ...string) map[string]string {
	n.t.Helper()
	addresses := map[string]string{}
	for k, id := range ids {
		begin := time.Now()
		if k == 0 {
			n.create(id)
		} else if err := n.join(id, ids[0], "acme"); err != nil {
			n.t.Fatal(err)
		}
		made := time.Since(begin)
		answer, err := n.tryActivate(id, "claim-"+id, n.shared("fn-"+id, "acme"), 30*time.Second)
		if err != nil {
			n.t.Fatal(err)
		}
		n.t.Logf("%s: made in %s, served in %s:%s", id, made, time.Since(begin), describe(answer.Phases))
		addresses[id] = answer.Instance.Address
	}
	return addresses
}

// wantServing checks that exactly these Instances are there and serve, each as the Function that it is.
func (n *instanceNode) wantServing(addresses map[string]string, ids ...string) {
	n.t.Helper()
	n.eventually(func() error {
		if got := n.states(); len(got) != len(ids) {
			return fmt.Errorf("states are %v, want %v to serve", got, ids)
		}
		return nil
	})
	for _, id := range ids {
		if got := n.states()[id]; got != hearthv1.State_STATE_SERVING {
			n.t.Errorf("%s is %s", id, got)
		}
		if got := n.get(addresses[id], "/env?name=WHO"); got != "fn-"+id {
			n.t.Errorf("%s answers as %q", id, got)
		}
	}
}

// hit sends a request that may be answered or not.
func hit(address, path string) {
	if r, err := http.Get("http://" + address + path); err == nil {
		r.Body.Close()
	}
}

// TestPod: several Functions in one sandbox, each with processes, limit, log and freezer of its own. What one does to itself, or
// what is done to it, the others do not notice.
func TestPod(t *testing.T) {
	n := newInstanceNode(t)
	at := n.sharePod("one", "two", "three", "four")
	host, _, _ := net.SplitHostPort(at["one"])
	for id, address := range at {
		other, port, _ := net.SplitHostPort(address)
		for path, want := range map[string]string{
			"/env?name=PORT": port, "/env?name=WHO": "fn-" + id, "/env?name=HOSTNAME": "one", "/file?name=/etc/hostname": "one\n",
			"/file?name=/sys/fs/cgroup/memory/memory.limit_in_bytes": "67108864\n", // v1, as on the machines that run this
			"/file?name=/proc/self/oom_score_adj":                    "500\n",
		} {
			if got := n.get(address, path); got != want {
				t.Errorf("%s: GET %s: %q, want %q", id, path, got, want)
			}
		}
		if status := n.get(address, "/file?name=/proc/self/status"); !strings.Contains(status, "NSpid:\t1\n") && !strings.Contains(status, "\nPid:\t1\n") {
			t.Errorf("%s is not process 1 of its own namespace: %s", id, status)
		}
		if other != host {
			t.Errorf("%s is at %s, not at %s", id, address, host)
		}
	}
	if got := n.sandboxes(); got != 1 {
		t.Errorf("there are %d sandboxes", got)
	}
	// Nobody else gets in.
	if err := n.join("intruder", "one", "evil"); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("another tenant's worker: %v", err)
	}
	// A flood stays in its own log.
	for range 50 {
		hit(at["two"], "/log?line="+strings.Repeat("x", 4000))
	}
	n.get(at["one"], "/log?line=from+one")
	n.wantLogsOf("fn-one", "one listening on 20000", "one from one")
	// One is frozen, and thaws alone.
	if _, err := n.calls.Freeze(t.Context(), connect.NewRequest(&hearthv1.FreezeRequest{InstanceId: "two"})); err != nil {
		t.Fatal(err)
	}
	if got := n.get(at["three"], "/"); got != "hello" {
		t.Errorf("beside a frozen one: %q", got)
	}
	if _, err := n.tryActivate("two", "claim-two-again", n.shared("fn-two", "acme"), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	hit(at["three"], "/hog")
	n.wantServing(at, "one", "two", "four")
	hit(at["four"], "/exit")
	n.wantServing(at, "one", "two")
	n.discard("one") // the one that the sandbox was made for
	n.wantServing(at, "two")
	if err := n.join("five", "one", "acme"); err != nil {
		t.Fatal(err)
	}
	answer, err := n.tryActivate("five", "claim-five", n.shared("fn-five", "acme"), 30*time.Second)
	if err != nil || answer.Instance.Address == at["three"] || answer.Instance.Address == at["four"] {
		t.Errorf("one that came later: %v, %v", answer, err)
	}
	n.discard("five", "two")
	n.eventually(n.leftBehind)
}

// TestPodEngineRestart: the next engine finds the pod, and what waits in it, although the Instance that it was made for has gone.
func TestPodEngineRestart(t *testing.T) {
	n := newInstanceNode(t)
	at := n.sharePod("one", "two", "three")
	if err := n.join("waits", "one", "acme"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"two", "three"} {
		n.eventually(func() error { return n.recorded(id) })
	}
	n.discard("one")
	n.stop()
	if got := n.get(at["two"], "/"); got != "hello" {
		t.Errorf("without an engine: %q", got)
	}
	hit(at["three"], "/exit") // and nobody is told
	n.startEngine()
	n.eventually(func() error {
		got := n.states()
		if len(got) != 2 || got["two"] != hearthv1.State_STATE_SERVING || got["waits"] != hearthv1.State_STATE_WARM {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	if _, err := n.tryActivate("waits", "c", n.shared("fn-x", "evil"), time.Second); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("another tenant's claim: %v", err)
	}
	answer, err := n.tryActivate("waits", "claim-waits", n.shared("fn-waits", "acme"), 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	at["waits"] = answer.Instance.Address
	n.wantServing(at, "two", "waits")
	n.discard("two", "waits")
	n.eventually(n.leftBehind)
}

// sandboxes counts the pods of the node.
func (n *instanceNode) sandboxes() int {
	n.t.Helper()
	containers, err := n.Client.Containers(n.context(n.t))
	if err != nil {
		n.t.Fatal(err)
	}
	count := 0
	for _, c := range containers {
		if !strings.HasSuffix(c.ID(), ".fn") {
			count++
		}
	}
	return count
}

// recorded is an error until containerd knows what an Instance serves.
func (n *instanceNode) recorded(id string) error {
	c, err := n.Client.LoadContainer(n.context(n.t), id+".fn")
	if err != nil {
		return err
	}
	labels, err := c.Labels(n.context(n.t))
	if err == nil && labels["hearth.dev/claim"] == "" {
		err = fmt.Errorf("%s is not recorded", id)
	}
	return err
}
