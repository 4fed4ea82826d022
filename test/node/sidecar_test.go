package node_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// withSidecars starts the engine again, so that it makes them.
func (n *instanceNode) withSidecars() {
	n.t.Helper()
	n.stop()
	n.sidecar = filepath.Join(n.t.TempDir(), "sidecar")
	build := exec.Command("go", "build", "-trimpath", "-o", n.sidecar, "../../cmd/sidecar")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		n.t.Fatalf("%v: %s", err, out)
	}
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
		if !strings.HasSuffix(a, ":8012") || n.get(a, "/") != "hello" {
			t.Errorf("the sidecar at %s does not answer", a)
		}
		if n.get(strings.TrimSuffix(a, "8012")+"8013", "/readyz") != "ok\n" {
			t.Errorf("the probe of %s is not ready", a)
		}
	}
	pid := n.sidecarPid("s-one")
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "Uid:\t65532"} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("its status has no %q:\n%s", want, text)
		}
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
