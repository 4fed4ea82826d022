package stack_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// TestMerged: Functions of one tenant's group share a pod, those of another tenant's do not; kill -9 of nodeagent and the end of the
// Function that was there first leave the others where they are, and nothing is left over.
func TestMerged(t *testing.T) {
	d := start(t)
	image := d.pushGo(t)
	for name, tenant := range map[string]string{"alpha": "acme", "beta": "acme", "gamma": "other"} {
		d.mustDeploy(t, name, image, func(s *hearthv1.FunctionSpec) {
			s.Tenant, s.Group, s.Resources = tenant, "low", &hearthv1.Resources{MemoryBytes: 64 << 20}
		})
	}
	d.settles(t)
	began := time.Now()
	d.web.answersBy(t, "alpha", time.Now().Add(longStart))
	alpha := d.only(t, "alpha")
	alone, first := d.memoryOf(t, alpha.GetPod()), time.Since(began)
	d.settles(t) // so that what fills the pool again is not measured
	began = time.Now()
	d.web.answersBy(t, "beta", time.Now().Add(longStart))
	second := time.Since(began)
	both := d.memoryOf(t, alpha.GetPod())
	d.web.answersBy(t, "gamma", time.Now().Add(longStart))
	beta, gamma := d.only(t, "beta"), d.only(t, "gamma")
	t.Logf("private memory of a pod with one worker %d KiB, with two %d KiB, of another pod %d KiB; first byte of the first after %v, of the second after %v",
		alone>>10, both>>10, d.memoryOf(t, gamma.GetPod())>>10, first, second)
	if beta.GetPod() != alpha.GetPod() || beta.GetAddress() == alpha.GetAddress() || gamma.GetPod() == alpha.GetPod() {
		t.Errorf("alpha is %v, beta %v, gamma %v", alpha, beta, gamma)
	}
	d.settles(t)

	busy := d.web.traffic("alpha")
	defer busy.stop()
	d.kill(t, "nodeagent")
	end := time.Now().Add(recovery)
	d.web.answersBy(t, "beta", end)
	d.readyBy(t, end)
	busy.check(t, false)
	d.settles(t)
	for name, was := range map[string]*hearthv1.Instance{"alpha": alpha, "beta": beta, "gamma": gamma} {
		if is := d.only(t, name); is.GetId() != was.GetId() || is.GetPod() != was.GetPod() || is.GetAddress() != was.GetAddress() {
			t.Errorf("%s was %v and is %v", name, was, is)
		}
	}

	d.remove(t, "alpha")
	d.web.answersBy(t, "beta", time.Now().Add(recovery))
	if is := d.only(t, "beta"); is.GetId() != beta.GetId() {
		t.Errorf("beta was %v and is %v", beta, is)
	}
	d.settles(t)
}

// only returns the one Instance of a Function.
func (d *deployment) only(t *testing.T, function string) *hearthv1.Instance {
	t.Helper()
	list, err := d.instances(t.Context(), function)
	if err != nil || len(list) != 1 {
		t.Fatalf("instances of %s are %v, %v", function, list, err)
	}
	return list[0]
}

// memoryOf is what the processes of a pod have for themselves, its shim included, in bytes.
func (d *deployment) memoryOf(t *testing.T, pod string) (bytes int64) {
	t.Helper()
	i, err := d.takeInventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sandbox := ""
	for id, of := range i.sandboxes {
		if of == pod {
			sandbox = id
		}
	}
	pids := map[string]bool{}
	for _, root := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		dir := filepath.Join(root, stack.CgroupParent(d.config.Name), "pod-"+pod)
		_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error { // one of the two there is
			if err == nil && e.Name() == "cgroup.procs" {
				text, _ := os.ReadFile(path)
				for pid := range strings.FieldsSeq(string(text)) {
					pids[pid] = true
				}
			}
			return nil
		})
	}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range lines {
		if text, _ := os.ReadFile(file); sandbox != "" && strings.Contains(string(text), "-id\x00"+sandbox) {
			pids[filepath.Base(filepath.Dir(file))] = true
		}
	}
	for pid := range pids {
		text, _ := os.ReadFile(filepath.Join("/proc", pid, "smaps_rollup"))
		for line := range strings.Lines(string(text)) {
			var what string
			var kib int64
			if _, err := fmt.Sscanf(line, "%s %d kB", &what, &kib); err == nil && strings.HasPrefix(what, "Private_") && what != "Private_Hugetlb:" {
				bytes += kib << 10
			}
		}
	}
	return bytes
}
