package node_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// withSidecars starts the engine again, so that it makes them.
func (n *instanceNode) withSidecars() {
	n.t.Helper()
	n.stop()
	n.sidecar = filepath.Join(n.t.TempDir(), "sidecar")
	buildCommand(n.t, "sidecar", n.sidecar)
	n.startEngine()
}

// sidecarPid is the process of an Instance's sidecar.
func (n *instanceNode) sidecarPid(id string) int {
	n.t.Helper()
	c, err := n.Client.LoadContainer(n.context(n.t), id+".sidecar")
	if err != nil {
		n.t.Fatal(err)
	}
	task, err := c.Task(n.context(n.t), nil)
	if err != nil {
		n.t.Fatal(err)
	}
	return int(task.Pid())
}

// TestSidecar: requests come to the sidecar, which reaches a Function on loopback, has nothing that it does not need, and whose
// death ends its Instance and no other.
func TestSidecar(t *testing.T) {
	n := newInstanceNode(t)
	n.withSidecars()
	n.create("s-one", "s-two", "s-three")
	one, err := n.tryActivate("s-one", "claim-one", n.revision("loopback"), 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	two := n.activate("s-two")
	for _, a := range []string{one.Instance.Address, two.Instance.Address} {
		n.wantSidecar(a, "hello")
	}
	pid := n.sidecarPid("s-one")
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	wantConfined(t, string(text))
	if !bytes.Contains(text, []byte("Uid:\t65532")) {
		t.Errorf("its user is another:\n%s", text)
	}
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !bytes.Contains(groups, []byte(n.cgroup+"/pod-s-one/sidecar")) {
		t.Errorf("cgroups: %s, %v", groups, err)
	}
	if limit, err := os.ReadFile(filepath.Join("/sys/fs/cgroup/memory", n.cgroup, "pod-s-one/sidecar/memory.limit_in_bytes")); err == nil {
		if bytes, _ := strconv.Atoi(strings.TrimSpace(string(limit))); bytes < 24<<20 || bytes > 128<<20 {
			t.Errorf("its memory limit is %s", limit)
		}
	}
	// A warm one and one that serves die; the third goes on.
	for _, id := range []string{"s-one", "s-three"} {
		if err := syscall.Kill(n.sidecarPid(id), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	n.eventually(func() error {
		if got := n.states(); len(got) != 1 {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	if n.get(two.Instance.Address, "/") != "hello" {
		t.Error("the other instance does not answer")
	}
	n.discard("s-two")
	n.eventually(n.leftBehind)
}

// TestSidecarDiesUnseen: the sidecar ends while there is no engine; the next one discards its Instance, and serves on with one
// that has none.
func TestSidecarDiesUnseen(t *testing.T) {
	n := newInstanceNode(t)
	n.withSidecars()
	n.create("s-dying", "s-well")
	n.activate("s-dying")
	address := n.activate("s-well").Instance.Address
	for _, id := range []string{"s-dying", "s-well"} {
		n.eventually(func() error {
			c, err := n.Client.LoadContainer(n.context(t), id+".fn")
			if err != nil {
				return err
			}
			labels, err := c.Labels(n.context(t))
			if err == nil && labels["hearth.dev/claim"] == "" {
				err = errors.New("it is not recorded")
			}
			return err
		})
	}
	pid := n.sidecarPid("s-dying")
	n.stop()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.sidecar = ""
	n.startEngine()
	n.create("s-bare")
	bare := n.activate("s-bare").Instance.Address
	if !strings.HasSuffix(bare, ":8080") || n.get(bare, "/") != "hello" || n.get(address, "/") != "hello" {
		t.Errorf("%s and %s do not both answer", bare, address)
	}
	n.eventually(func() error {
		if got := n.states(); len(got) != 2 {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	n.discard("s-well", "s-bare")
	n.eventually(n.leftBehind)
}

// wantSidecar says that an Instance's address is its sidecar's, that it answers there, and that its probe is ready.
func (n *instanceNode) wantSidecar(address, want string) {
	n.t.Helper()
	if !strings.HasSuffix(address, ":8012") || n.get(address, "/") != want {
		n.t.Errorf("the sidecar at %s does not answer %q", address, want)
	}
	if n.get(strings.TrimSuffix(address, "8012")+"8013", "/readyz") != "ok\n" {
		n.t.Errorf("the probe of %s is not ready", address)
	}
}

// TestSidecarOfFrozen: the freezer holds the Function and not its sidecar, which keeps a request until the thaw, over a restart of
// the engine too.
func TestSidecarOfFrozen(t *testing.T) {
	n := newInstanceNode(t)
	n.withSidecars()
	box := id("s-frozen")
	n.create(box)
	address := n.activate(box).Instance.Address
	probe := strings.TrimSuffix(address, "8012") + "8013"
	for round, restart := range []bool{false, true, false} {
		if p := n.freeze(box); p.State != hearthv1.State_STATE_FROZEN || p.Address != address {
			t.Errorf("frozen: %v", p)
		}
		n.wantFreezer(box, true)
		own, err := os.ReadFile(strings.Replace(n.cgroupFile(box, "freezer", "freezer.state", "cgroup.freeze"), "/fn/", "/sidecar/", 1))
		if word := strings.TrimSpace(string(own)); err != nil || word != "THAWED" && word != "0" {
			t.Errorf("the sidecar's freezer says %q, %v", own, err)
		}
		if got := n.get(probe, "/healthz"); got != "ok\n" {
			t.Errorf("its sidecar says %q", got)
		}
		if restart {
			n.stop()
			n.startEngine()
			if got := n.states(); len(got) != 1 || got[box] != hearthv1.State_STATE_FROZEN {
				t.Fatalf("after a restart states are %v", got)
			}
		}
		early := make(chan string, 1)
		go func() { early <- n.try(address, "/") }()
		answer, err := n.tryActivate(box, fmt.Sprint("again-", round), n.revision(), 30*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("thaw:%s", describe(answer.Phases))
		if got := <-early; got != "hello" {
			t.Errorf("the request that came before the thaw: %q", got)
		}
		n.wantSidecar(answer.Instance.Address, "hello")
		n.eventually(func() error {
			if since := n.label(box, "frozen"); since != "" {
				return errors.New("the thaw is not recorded")
			}
			return nil
		})
	}
	n.freeze(box)
	n.discard(box)
	n.eventually(n.leftBehind)
}

// TestSidecarOfRuntimes: loaders that were booted ahead, at the claim, and one whose Function is another program; the loader
// listens where it always does.
func TestSidecarOfRuntimes(t *testing.T) {
	n := newRuntimeNode(t)
	n.withSidecars()
	n.boot("sr-a", "sr-late", "sr-program")
	n.create(id("sr-cold"))
	n.prepare("one", "program")
	a, cold := n.load("sr-a", n.of("one", "main")), n.load("sr-cold", n.of("one", "main"))
	for _, address := range []string{a, cold} {
		n.wantSidecar(address, "main")
		if got := n.get(strings.TrimSuffix(address, "8012")+"8080", "/"); got != "main" {
			t.Errorf("the loader beside %s says %q", address, got)
		}
	}
	n.wantSidecar(n.load("sr-program", n.of("program", "executes")), "hello")
	n.freeze(id("sr-a"))
	answer, err := n.tryActivate(id("sr-a"), "again", n.of("one", "main"), 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	n.wantSidecar(answer.Instance.Address, "main")
	if got := n.get(a, "/thawed"); !strings.HasSuffix(got, " 32") {
		t.Errorf("the loader was told of the thaw: %q", got)
	}
	n.stop()
	n.startEngine()
	n.eventually(func() error { // its loader has to greet
		if got := n.states()[id("sr-late")]; got != hearthv1.State_STATE_WARM {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	n.wantSidecar(n.load("sr-late", n.of("one", "main")), "main")
	for name := range n.states() {
		n.discard(name)
	}
	n.eventually(n.leftBehind)
}
