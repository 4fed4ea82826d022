package stack_test

import (
	"context"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/internal/stack"
)

// TestEndsWithoutATrace ends deployments; that nothing is left is checked by stop, as in every test here.
func TestEndsWithoutATrace(t *testing.T) {
	t.Run("at rest", func(t *testing.T) {
		d := start(t)
		d.mustDeploy(t, "one", d.pushGo(t))
		d.web.answersBy(t, "one", time.Now().Add(longStart))
		d.settles(t)
		d.auditSeesStrays(t)
		d.stop(t)
	})
	t.Run("with requests and a pull under way", func(t *testing.T) {
		d := start(t)
		d.mustDeploy(t, "one", d.pushGo(t))
		big := push(t, d.status.Registry, "big", withLayers(t, goImage(t), bigLayer(t, 2)))
		d.web.answersBy(t, "one", time.Now().Add(longStart))
		ctx, cancel := context.WithCancel(t.Context())
		var asked sync.WaitGroup
		defer asked.Wait()
		defer cancel()
		for range 15 { // more than one instance serves at once
			asked.Go(func() { _, _ = d.web.get(ctx, "one", "/sleep?ms=1000") })
		}
		if err := d.deploy(t, "big", big, false); err != nil {
			t.Fatal(err)
		}
		asked.Go(func() { _, _ = d.web.get(ctx, "big", "/") })
		for end := time.Now().Add(longStart); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if staged, err := os.ReadDir(d.snapshotterDir("staging")); err == nil && len(staged) > 0 {
				break
			}
		}
		d.stop(t)
	})
}

// auditSeesStrays makes what would be a leak, and sees that it is called one: an audit that finds nothing could be blind. What is
// strayed is left for the deployment's end to clear up.
func (d *deployment) auditSeesStrays(t *testing.T) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	kept := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "stray"}) // or containerd's collector may be the first to find it
	if _, err := d.containerd.SnapshotService("hearth").Prepare(ctx, "stray", "", kept); err != nil {
		t.Fatal(err)
	}
	metadata := &cri.PodSandboxMetadata{Name: "stray", Namespace: "hearth", Uid: "stray"}
	pod, err := d.sandboxes.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: &cri.PodSandboxConfig{
		Metadata: metadata, Linux: &cri.LinuxPodSandboxConfig{CgroupParent: stack.CgroupParent(d.config.Name)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	i, err := d.takeInventory(ctx)
	if err != nil {
		t.Fatal(err)
	}
	delete(i.sandboxes, pod.GetPodSandboxId()) // as if the CRI had forgotten it
	found := strings.Join(i.problems(), "\n")
	for _, want := range []string{"snapshot stray", "container " + pod.GetPodSandboxId(), "mount of nobody", "network namespaces"} {
		if !strings.Contains(found, want) {
			t.Errorf("the audit does not see %q:\n%s", want, found)
		}
	}
	if vestiges, err := stack.Leftovers(d.config); err != nil || len(vestiges) == 0 || len(marked(d.config.Run)) == 0 {
		t.Errorf("a deployment that runs has %d leftovers, error %v", len(vestiges), err)
	}
}
