package node_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestOrphansEnd: a process that is in an Instance's cgroup and that containerd does not know of, as runc leaves one when it is
// killed, ends with the Instance. One is held by the sidecar's freezer besides, as runc leaves that, too.
func TestOrphansEnd(t *testing.T) {
	n := newInstanceNode(t)
	n.withSidecars()
	n.create("orphans")
	n.activate("orphans")
	var orphans []*exec.Cmd
	for _, part := range []string{"fn", "sidecar"} {
		c := exec.Command("sleep", "1000")
		check(t, c.Start())
		orphans = append(orphans, c)
		for _, pod := range n.cgroups() {
			if _, err := os.Stat(filepath.Join(pod, part)); err == nil {
				check(t, os.WriteFile(filepath.Join(pod, part, "cgroup.procs"), fmt.Append(nil, c.Process.Pid), 0))
			}
		}
	}
	for _, pod := range n.cgroups() {
		for file, word := range map[string]string{"freezer.state": "FROZEN", "cgroup.freeze": "1"} {
			path := filepath.Join(pod, "sidecar", file)
			if _, err := os.Stat(path); err == nil {
				check(t, os.WriteFile(path, []byte(word), 0))
			}
		}
	}
	n.discard("orphans")
	for _, c := range orphans {
		if err := c.Wait(); err == nil || c.ProcessState.Exited() {
			t.Errorf("it ended by itself: %v", c.ProcessState)
		}
	}
	check(t, n.leftBehind())
}
