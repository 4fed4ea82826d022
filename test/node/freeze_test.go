package node_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	containerd "github.com/containerd/containerd/v2/client"
	"google.golang.org/protobuf/types/known/durationpb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func (n *instanceNode) freeze(id string) *hearthv1.Instance {
	n.t.Helper()
	answer, err := n.calls.Freeze(context.Background(), connect.NewRequest(&hearthv1.FreezeRequest{InstanceId: id, Epoch: 1, Reclaim: true}))
	if err != nil {
		n.t.Fatal(err)
	}
	return answer.Msg.Instance
}

// frozen makes Instances that are.
func (n *instanceNode) frozen(ids ...string) {
	n.t.Helper()
	n.create(ids...)
	for _, id := range ids {
		n.activate(id)
		n.freeze(id)
	}
}

// cgroupFile is a file of a Function's cgroup: that of version 1's hierarchy, or of version 2.
func (n *instanceNode) cgroupFile(id, hierarchy, file1, file2 string) string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return filepath.Join("/sys/fs/cgroup", n.cgroup, "pod-"+id, "fn", file2)
	}
	return filepath.Join("/sys/fs/cgroup", hierarchy, n.cgroup, "pod-"+id, "fn", file1)
}

func (n *instanceNode) wantFreezer(id string, frozen bool) {
	n.t.Helper()
	text, err := os.ReadFile(n.cgroupFile(id, "freezer", "freezer.state", "cgroup.freeze"))
	if err != nil {
		n.t.Fatal(err)
	}
	word := strings.TrimSpace(string(text))
	if got := word == "FROZEN" || word == "1"; got != frozen {
		n.t.Errorf("the freezer of %s says %s", id, word)
	}
}

// label is one of an Instance's container.
func (n *instanceNode) label(id, key string) string {
	n.t.Helper()
	c, err := n.Client.LoadContainer(n.context(n.t), id+".fn")
	if err != nil {
		n.t.Fatal(err)
	}
	labels, err := c.Labels(n.context(n.t))
	if err != nil {
		n.t.Fatal(err)
	}
	return labels["hearth.dev/"+key]
}

func (n *instanceNode) task(id string) containerd.Task {
	n.t.Helper()
	c, err := n.Client.LoadContainer(n.context(n.t), id+".fn")
	if err != nil {
		n.t.Fatal(err)
	}
	task, err := c.Task(n.context(n.t), nil)
	if err != nil {
		n.t.Fatal(err)
	}
	return task
}

// TestInstanceFreezes freezes and thaws one, again and again, and restarts the engine over it.
func TestInstanceFreezes(t *testing.T) {
	n := newInstanceNode(t)
	n.create("one")
	address := n.activate("one").Instance.Address
	for round := range 5 {
		p := n.freeze("one")
		if p.State != hearthv1.State_STATE_FROZEN || p.MemoryBytes <= 0 || p.Address != address {
			t.Errorf("frozen: %v", p)
		}
		n.wantFreezer("one", true)
		if since, err := time.Parse(time.RFC3339Nano, n.label("one", "frozen")); err != nil || time.Since(since) < 0 {
			t.Errorf("frozen since %s: %v", since, err)
		}
		answer, err := n.tryActivate("one", fmt.Sprint("again-", round), n.revision(), 30*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if got := n.get(answer.Instance.Address, "/"); got != "hello" {
			t.Errorf("after a thaw: %q", got)
		}
		t.Logf("%d MiB, thaw:%s, first byte +%s", p.MemoryBytes>>20, describe(answer.Phases), time.Since(begin))
		n.eventually(func() error { // the record comes after the answer
			if claim, since := n.label("one", "claim"), n.label("one", "frozen"); claim != fmt.Sprint("again-", round) || since != "" {
				return fmt.Errorf("recorded: claim %s, frozen %s", claim, since)
			}
			return nil
		})
	}
	n.freeze("one")
	n.stop()
	n.wantFreezer("one", true)
	n.startEngine()
	if got := n.states(); len(got) != 1 || got["one"] != hearthv1.State_STATE_FROZEN {
		t.Fatalf("after a restart states are %v", got)
	}
	if got := n.get(n.activate("one").Instance.Address, "/"); got != "hello" {
		t.Errorf("after restart and thaw: %q", got)
	}
	n.discard("one")
	n.eventually(n.leftBehind)
}

// TestInstanceThawedUnrecorded: a claim thawed it, and the engine was killed before that was recorded.
func TestInstanceThawedUnrecorded(t *testing.T) {
	n := newInstanceNode(t)
	n.frozen("thawed", "kept")
	n.stop()
	if err := os.WriteFile(n.cgroupFile("thawed", "freezer", "freezer.state", "cgroup.freeze"), thawWord(), 0); err != nil {
		t.Fatal(err)
	}
	n.startEngine()
	n.eventually(func() error {
		if got := n.states(); len(got) != 1 || got["kept"] != hearthv1.State_STATE_FROZEN {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	n.discard("kept")
	n.eventually(n.leftBehind)
}

func thawWord() []byte {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return []byte("0")
	}
	return []byte("THAWED")
}

// TestFrozenInstanceEnds ends frozen Instances in every way that there is.
func TestFrozenInstanceEnds(t *testing.T) {
	n := newInstanceNode(t)
	for name, end := range map[string]func(t *testing.T, id string){
		"discard": func(_ *testing.T, id string) { n.discard(id) },
		"term":    func(t *testing.T, id string) { check(t, n.task(id).Kill(n.context(t), syscall.SIGTERM)) },
		"kill":    func(t *testing.T, id string) { check(t, n.task(id).Kill(n.context(t), syscall.SIGKILL)) },
		"oom": func(t *testing.T, id string) { // what the kernel's killer does to it
			check(t, syscall.Kill(int(n.task(id).Pid()), syscall.SIGKILL))
		},
		"sandbox": func(t *testing.T, id string) {
			boxes, err := n.Pods.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{
				Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{"hearth.dev/instance": id}},
			})
			check(t, err)
			// nodeagent hears of its end in the midst of it and stops it as well, so that either may find the other's network half gone.
			// That it has ended is seen below.
			if _, err = n.Pods.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: boxes.Items[0].Id}); err != nil {
				t.Logf("stop the sandbox: %v", err)
			}
		},
		"thawed": func(t *testing.T, id string) {
			check(t, os.WriteFile(n.cgroupFile(id, "freezer", "freezer.state", "cgroup.freeze"), thawWord(), 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			n.frozen(name)
			end(t, name)
			n.eventually(n.leftBehind)
			if got := n.states(); len(got) > 0 {
				t.Errorf("states are %v", got)
			}
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestFrozenIgnoresSIGTERM: a Function that does not want to end, frozen, ends when its grace is over.
func TestFrozenIgnoresSIGTERM(t *testing.T) {
	n := newInstanceNode(t)
	n.create("one")
	if _, err := n.tryActivate("one", "c", n.revision("ignore"), 30*time.Second); err != nil {
		t.Fatal(err)
	}
	n.freeze("one")
	_, err := n.calls.Discard(context.Background(), connect.NewRequest(&hearthv1.DiscardRequest{
		InstanceId: "one", Grace: durationpb.New(500 * time.Millisecond),
	}))
	if err != nil {
		t.Error(err)
	}
	if err := n.leftBehind(); err != nil {
		t.Error(err)
	}
}

// try asks a Function for something that may end it.
func (n *instanceNode) try(address, path string) string {
	client := &http.Client{Timeout: 20 * time.Second}
	defer client.CloseIdleConnections()
	r, err := client.Get("http://" + address + path)
	if err != nil {
		return err.Error()
	}
	defer r.Body.Close()
	body := make([]byte, 1<<10)
	k, _ := r.Body.Read(body)
	return string(body[:k])
}

// TestHostileFunctions has Functions take all that they can get, beside one that wants to serve.
func TestHostileFunctions(t *testing.T) {
	n := newInstanceNode(t)
	n.create("neighbour", "fork", "hog", "fill", "fill-tmp", "files")
	neighbour := n.activate("neighbour").Instance.Address
	limit, err := os.ReadFile(n.cgroupFile("fork", "pids", "pids.max", "pids.max"))
	if err != nil || strings.TrimSpace(string(limit)) != "1024" {
		t.Errorf("the limit of processes is %s, %v", limit, err)
	}
	t.Run("fork bomb", func(t *testing.T) {
		got := n.try(n.activate("fork").Instance.Address, "/fork")
		t.Logf("it got %q", got)
		if text, err := os.ReadFile(n.cgroupFile("fork", "pids", "pids.current", "pids.current")); err == nil {
			if current, err := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || current > 1024 {
				t.Errorf("it has %s processes and threads, %v", text, err)
			}
		}
		if got := n.get(neighbour, "/"); got != "hello" {
			t.Errorf("its neighbour says %q", got)
		}
		n.discard("fork")
	})
	t.Run("memory hog", func(t *testing.T) {
		// No limit of its own: the node's holds.
		r := n.revision()
		r.Resources = nil
		answer, err := n.tryActivate("hog", "claim-hog", r, 30*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("it got %q", n.try(answer.Instance.Address, "/hog"))
		n.eventually(func() error { // it is killed, and found
			if state, ok := n.states()["hog"]; ok {
				return fmt.Errorf("it is %s", state)
			}
			return nil
		})
		if got := n.get(neighbour, "/"); got != "hello" {
			t.Errorf("its neighbour says %q", got)
		}
	})
	t.Run("full tmpfs", func(t *testing.T) {
		address := n.activate("fill").Instance.Address
		for _, name := range []string{"/run/x", "/dev/shm/x", "/dev/x"} {
			if got := n.try(address, "/fill?name="+name); !strings.Contains(got, "no space left") || !strings.HasPrefix(got, "64 MiB") {
				t.Errorf("%s: it got %q", name, got)
			}
		}
		if got := n.get(address, "/"); got != "hello" {
			t.Errorf("it says %q itself", got)
		}
		address = n.activate("fill-tmp").Instance.Address // its limit has no room for all of them
		for name, want := range map[string]string{"/tmp/x": "128 MiB", "/var/tmp/x": "64 MiB", "/x": "0 MiB, open /x: read-only"} {
			if got := n.try(address, "/fill?name="+name); !strings.HasPrefix(got, want) {
				t.Errorf("%s: it got %q, want %s", name, got, want)
			}
		}
		n.discard("fill", "fill-tmp")
	})
	t.Run("empty files", func(t *testing.T) { // which take no room of a tmpfs, but memory
		address := n.activate("files").Instance.Address
		if got := n.try(address, "/files?dir=/tmp"); got == "all" {
			t.Error("it made four million files")
		}
		n.eventually(func() error {
			if state, ok := n.states()["files"]; ok {
				return fmt.Errorf("it is %s", state)
			}
			return nil
		})
		if got := n.get(neighbour, "/"); got != "hello" {
			t.Errorf("its neighbour says %q", got)
		}
	})
	n.discard("neighbour")
	n.eventually(n.leftBehind)
}

// TestCrashIsNoticed kills a process outright: one that serves, one that is frozen, and one that serves while containerd is away. It
// logs how long it took to be told.
func TestCrashIsNoticed(t *testing.T) {
	n := newInstanceNode(t)
	n.create("serving", "alone")
	n.activate("serving")
	n.activate("alone")
	n.frozen("frozen")
	pids := map[string]int{}
	for _, id := range []string{"serving", "alone", "frozen"} {
		pids[id] = int(n.task(id).Pid())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := n.calls.WatchInstances(ctx, connect.NewRequest(&hearthv1.WatchInstancesRequest{}))
	check(t, err)
	defer stream.Close()
	for stream.Receive() && !stream.Msg().GetSynced() {
	}
	for _, id := range []string{"serving", "frozen", "alone"} {
		if id == "alone" {
			n.kill(t)
		}
		begin := time.Now()
		check(t, syscall.Kill(pids[id], syscall.SIGKILL))
		if id == "frozen" { // version 1's freezer holds it even so; the kernel's own killer thaws what it kills
			check(t, os.WriteFile(n.cgroupFile(id, "freezer", "freezer.state", "cgroup.freeze"), thawWord(), 0))
		}
		for {
			if !stream.Receive() {
				t.Fatalf("%s: heard nothing: %v", id, stream.Err())
			}
			if i := stream.Msg().GetInstance(); i.GetId() == id && i.State == hearthv1.State_STATE_GONE {
				break
			}
		}
		t.Logf("%s: told after %s", id, time.Since(begin))
	}
	n.start(t)
	n.eventually(n.leftBehind)
}
