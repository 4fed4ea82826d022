package stack_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/image-spec/identity"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// Labels of Instances, as docs/ARCHITECTURE.md has them.
const (
	labelInstance = "hearth.dev/instance"
	labelClaim    = "hearth.dev/claim"
	labelCode     = "hearth.dev/code"
	labelKind     = "io.cri-containerd.kind"
)

// inventory is what there is, by everyone who knows.
type inventory struct {
	instances  map[string]*hearthv1.Instance
	sandboxes  map[string]string // sandbox id → pod
	containers map[string]map[string]string
	snapshotOf map[string]bool // keys of snapshots that containers have
	snapshots  map[string]snapshots.Info
	chains     map[string]bool // of all images
	dirs       int             // snapshots on the disk
	layers     map[string]bool // kept on the disk; a pull that failed may keep some for a minute, until it is given up
	staging    []string
	mounts     []string
	views      map[string]bool // keys of code packages' snapshots that containers have
	warm       map[string]int  // how many Instances are to be warm, by Runtime
	sidecars   bool            // each Instance is to have one
}

// settles waits until nothing is left over of what has ended, and the pool is full.
func (d *deployment) settles(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), settling)
	defer cancel()
	began := time.Now()
	problems := []string{"nothing was looked at yet"}
	for {
		err := d.collectGarbage(ctx)
		var i *inventory
		if err == nil {
			i, err = d.takeInventory(ctx)
		}
		if err == nil {
			if problems = i.problems(); len(problems) == 0 {
				t.Logf("settled after %v", time.Since(began).Round(time.Millisecond))
				return
			}
		}
		if ctx.Err() != nil {
			t.Fatalf("after %v there is still (last error %v):\n%s", settling, err, strings.Join(problems, "\n"))
		}
		nap(ctx, 100*time.Millisecond)
	}
}

// collectGarbage has containerd do now what it would do some time.
func (d *deployment) collectGarbage(ctx context.Context) error {
	ctx = namespaces.WithNamespace(ctx, "k8s.io")
	service := d.containerd.LeasesService()
	l, err := service.Create(ctx, leases.WithRandomID())
	if err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	return service.Delete(ctx, l, leases.SynchronousDelete)
}

func (d *deployment) takeInventory(ctx context.Context) (*inventory, error) {
	ctx = namespaces.WithNamespace(ctx, "k8s.io")
	i := &inventory{
		instances: map[string]*hearthv1.Instance{}, sandboxes: map[string]string{}, containers: map[string]map[string]string{},
		snapshotOf: map[string]bool{}, snapshots: map[string]snapshots.Info{}, chains: map[string]bool{},
		views: map[string]bool{}, warm: maps.Clone(d.booted), sidecars: d.config.Sidecar,
	}
	i.warm[""] = pool
	for _, take := range []func(context.Context, *inventory) error{d.takeInstances, d.takeContainers, d.takeSnapshots, d.takeImages, d.takeDisk} {
		if err := take(ctx, i); err != nil {
			return nil, err
		}
	}
	return i, nil
}

func (d *deployment) takeInstances(ctx context.Context, i *inventory) error {
	list, err := d.instances(ctx, "")
	if err != nil {
		return err
	}
	for _, each := range list {
		i.instances[each.GetId()] = each
	}
	pods, err := d.sandboxes.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range pods.GetItems() {
		i.sandboxes[p.GetId()] = p.GetLabels()[labelInstance]
	}
	return nil
}

func (d *deployment) takeContainers(ctx context.Context, i *inventory) error {
	list, err := d.containerd.ContainerService().List(ctx)
	if err != nil {
		return err
	}
	for _, c := range list {
		i.containers[c.ID] = c.Labels
		if key := c.Labels[labelCode]; key != "" {
			i.views[key] = true
		}
		if c.SnapshotKey != "" { // one that waits for a Function has none
			i.snapshotOf[c.SnapshotKey] = true
		}
	}
	return nil
}

func (d *deployment) takeSnapshots(ctx context.Context, i *inventory) error {
	return d.containerd.SnapshotService("hearth").Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		i.snapshots[info.Name] = info
		return nil
	})
}

func (d *deployment) takeImages(ctx context.Context, i *inventory) error {
	list, err := d.containerd.ListImages(ctx)
	if err != nil {
		return err
	}
	for _, img := range list {
		ids, err := img.RootFS(ctx)
		if err != nil {
			return err
		}
		for n := range ids {
			i.chains[identity.ChainID(ids[:n+1]).String()] = true
		}
	}
	return nil
}

func (d *deployment) takeDisk(_ context.Context, i *inventory) error {
	dirs, err := os.ReadDir(d.snapshotterDir("snapshots"))
	if err != nil {
		return err
	}
	i.dirs, i.layers = len(dirs), map[string]bool{}
	layers, err := os.ReadDir(d.snapshotterDir("layers"))
	if err != nil {
		return err
	}
	for _, dir := range layers {
		i.layers[dir.Name()] = true
	}
	if i.staging, err = filepath.Glob(filepath.Join(d.snapshotterDir("staging"), "*")); err != nil {
		return err
	}
	i.mounts, err = mountsBelow(d.config.Root, d.config.Run)
	return err
}

// problems says what is there that should not be, or the other way round.
func (i *inventory) problems() []string {
	out := append(i.instanceProblems(), i.containerProblems()...)
	return append(append(out, i.snapshotProblems()...), i.mountProblems()...)
}

func (i *inventory) instanceProblems() (out []string) {
	warm, claimed := map[string]int{}, map[string]string{}
	for id, inst := range i.instances {
		switch inst.GetState() {
		case hearthv1.State_STATE_WARM:
			warm[inst.GetRuntime()]++
		case hearthv1.State_STATE_SERVING, hearthv1.State_STATE_FROZEN:
		default:
			out = append(out, fmt.Sprintf("instance %s of %q is %s", id, inst.GetFunction(), inst.GetState()))
		}
		if claim := inst.GetClaim().GetId(); claim != "" {
			if other := claimed[claim]; other != "" {
				out = append(out, fmt.Sprintf("claim %s has two instances, %s and %s", claim, id, other))
			}
			claimed[claim] = id
		}
	}
	if !maps.Equal(warm, i.warm) {
		out = append(out, fmt.Sprintf("so many instances are warm, by runtime: %v, not %v", warm, i.warm))
	}
	pods, seen := map[string]bool{}, map[string]bool{}
	for _, inst := range i.instances {
		pods[inst.GetPod()] = true
	}
	for sandbox, pod := range i.sandboxes {
		if !pods[pod] || seen[pod] {
			out = append(out, fmt.Sprintf("sandbox %s is of no instance that is known, or its pod's second: %q", sandbox, pod))
		}
		seen[pod] = true
	}
	for id, inst := range i.instances {
		if !seen[inst.GetPod()] {
			out = append(out, fmt.Sprintf("instance %s has no sandbox", id))
		}
	}
	return out
}

func (i *inventory) containerProblems() (out []string) {
	seen, beside := map[string]bool{}, map[string]bool{}
	for id, labels := range i.containers {
		if labels[labelKind] == "sandbox" {
			if _, ok := i.sandboxes[id]; !ok {
				out = append(out, fmt.Sprintf("container %s is of no sandbox", id))
			}
			continue
		}
		instance := labels[labelInstance]
		inst := i.instances[instance]
		if i.sidecars && inst != nil && id == instance+".sidecar" {
			beside[instance] = true
			continue
		}
		switch {
		case inst == nil:
			out = append(out, fmt.Sprintf("container %s is of no instance that is known: %v", id, labels))
		case seen[instance]:
			out = append(out, fmt.Sprintf("instance %s has a second container %s", instance, id))
		case inst.GetState() == hearthv1.State_STATE_FROZEN: // nobody's now; the label names whose it was last
		case inst.GetClaim().GetId() != labels[labelClaim]:
			out = append(out, fmt.Sprintf("container %s has claim %q, its instance is %s with claim %q", id, labels[labelClaim], inst.GetState(), inst.GetClaim().GetId()))
		}
		seen[instance] = true
	}
	for id, inst := range i.instances {
		if !seen[id] {
			out = append(out, fmt.Sprintf("instance %s is %s without a container", id, inst.GetState()))
		}
		if i.sidecars && !beside[id] {
			out = append(out, fmt.Sprintf("instance %s is %s without a sidecar", id, inst.GetState()))
		}
	}
	return out
}

// preparedPerChain is how many snapshots the node keeps ready for one image: two for each Function that has it. No test has more
// than four Functions of one image.
const preparedPerChain = 8

func (i *inventory) snapshotProblems() (out []string) {
	prepared, mounted := map[string]int{}, map[string]int{}
	for key, info := range i.snapshots {
		switch {
		case info.Kind == snapshots.KindCommitted && i.chains[key]:
		case i.snapshotOf[key]:
		case i.views[key]:
		case info.Kind == snapshots.KindView && strings.HasPrefix(key, "hearth-"): // the node's own, of which claims get clones
			if mounted[info.Parent]++; mounted[info.Parent] > 1 {
				out = append(out, fmt.Sprintf("%d views of %s are mounted", mounted[info.Parent], info.Parent))
			}
		case info.Kind == snapshots.KindActive && strings.HasPrefix(key, "hearth-"):
			if prepared[info.Parent]++; prepared[info.Parent] > preparedPerChain {
				out = append(out, fmt.Sprintf("more than %d snapshots of %s are prepared", preparedPerChain, info.Parent))
			}
		default:
			out = append(out, fmt.Sprintf("snapshot %s (%s) is nobody's", key, info.Kind))
		}
	}
	for key := range i.snapshotOf {
		if _, ok := i.snapshots[key]; !ok {
			out = append(out, fmt.Sprintf("a container's snapshot %s does not exist", key))
		}
	}
	if i.dirs != len(i.snapshots) {
		out = append(out, fmt.Sprintf("%d snapshots on the disk, %d known to containerd", i.dirs, len(i.snapshots)))
	}
	for _, path := range i.staging {
		out = append(out, "unfinished layer "+path)
	}
	return out
}

// mountProblems compares mounts with those who have them: root file systems, shared memory, network namespaces and layers.
func (i *inventory) mountProblems() (out []string) {
	namespaces := 0
	for _, point := range i.mounts {
		dir, kind := filepath.Base(filepath.Dir(point)), filepath.Base(point)
		_, sandbox := i.sandboxes[dir]
		switch {
		case sandbox && (kind == "rootfs" || kind == "shm"): // a Function's root file system is mounted where nobody sees it
		case kind == "fs" && i.layers[dir]:
		case dir == "netns":
			namespaces++
		default:
			out = append(out, "mount of nobody: "+point)
		}
	}
	if namespaces != len(i.sandboxes) {
		out = append(out, fmt.Sprintf("%d network namespaces for %d sandboxes", namespaces, len(i.sandboxes)))
	}
	return out
}
