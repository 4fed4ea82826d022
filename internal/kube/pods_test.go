package kube

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

// fakeManager is a Manager as far as pods and nodes are concerned, and a nodeagent that does what it is told.
type fakeManager struct {
	pool.Node // what is not used panics

	mu        sync.Mutex
	instances map[string]*hearthv1.Instance
	down      bool
	released  []string
	discarded []string
	refuse    error
	told      []string
	sets      []pool.WarmSet
}

func (f *fakeManager) Instance(id string) *hearthv1.Instance {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.instances[id]
}

func (f *fakeManager) InPod(name string) (all []*hearthv1.Instance) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, i := range f.instances {
		if i.GetPod() == name {
			all = append(all, i)
		}
	}
	return all
}

func (f *fakeManager) NodeUp(string) bool { return !f.down }

func (f *fakeManager) Release(_ context.Context, r *connect.Request[hearthv1.ReleaseRequest]) (*connect.Response[hearthv1.ReleaseResponse], error) {
	f.released = append(f.released, r.Msg.GetInstanceId())
	f.instances[r.Msg.GetInstanceId()].State = hearthv1.State_STATE_DRAINING
	return connect.NewResponse(&hearthv1.ReleaseResponse{}), nil
}

func (f *fakeManager) CreateInstance(_ context.Context, r *hearthv1.CreateInstanceRequest) (*hearthv1.Instance, error) {
	if f.refuse != nil {
		return nil, f.refuse
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.instances[r.GetId()] = &hearthv1.Instance{Id: r.GetId(), Pod: r.GetId(), State: hearthv1.State_STATE_WARM}
	return f.instances[r.GetId()], nil
}

func (f *fakeManager) Discard(_ context.Context, r *hearthv1.DiscardRequest) error {
	f.discarded = append(f.discarded, r.GetInstanceId())
	delete(f.instances, r.GetInstanceId())
	return nil
}

func (f *fakeManager) SetWarmSets(sets []pool.WarmSet) { f.sets = sets }
func (f *fakeManager) SupplyErrors(string) []string    { return nil }

func (f *fakeManager) AddNode(name string, _ pool.Node, info pool.NodeInfo) error {
	f.told = append(f.told, fmt.Sprintf("add %s %v", name, info.Cordoned))
	return nil
}

func (f *fakeManager) UpdateNode(name string, info pool.NodeInfo) {
	f.told = append(f.told, fmt.Sprintf("update %s %v", name, info.Cordoned))
}

func (f *fakeManager) RemoveNode(name string) { f.told = append(f.told, "remove "+name) }

// cluster is an API server in memory that counts what is written, and can be away.
type cluster struct {
	client.Client
	t      *testing.T
	writes atomic.Int64
	away   bool
	pool   *fakeManager
	pods   *pods
}

func newCluster(t *testing.T, objects ...client.Object) *cluster {
	c := &cluster{t: t, pool: &fakeManager{instances: map[string]*hearthv1.Instance{}}}
	write := func() error {
		if c.away {
			return errAway
		}
		c.writes.Add(1)
		return nil
	}
	c.Client = fake.NewClientBuilder().WithScheme(NewScheme()).WithObjects(objects...).WithInterceptorFuncs(interceptor.Funcs{
		Create: func(ctx context.Context, w client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if err := write(); err != nil {
				return err
			}
			o.SetCreationTimestamp(metav1.Now()) // the fake leaves that out
			return w.Create(ctx, o, opts...)
		},
		Delete: func(ctx context.Context, w client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			if err := write(); err != nil {
				return err
			}
			return w.Delete(ctx, o, opts...)
		},
		Patch: func(ctx context.Context, w client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
			if err := write(); err != nil {
				return err
			}
			return w.Patch(ctx, o, p, opts...)
		},
		SubResourcePatch: func(ctx context.Context, w client.Client, subresource string, o client.Object, p client.Patch, _ ...client.SubResourcePatchOption) error {
			if subresource != "resize" {
				t.Errorf("subresource %s was written", subresource)
			}
			if err := write(); err != nil {
				return err
			}
			data, err := p.Data(o)
			if err != nil {
				return err
			}
			return w.(client.WithWatch).Patch(ctx, o, client.RawPatch(p.Type(), data))
		},
	}).Build()
	c.pods = &pods{api: c, live: c, manager: c.pool, pools: newPools(c.pool), namespace: "hearth", image: "pause",
		requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("64Mi")},
		log:      slog.New(slog.DiscardHandler)}
	c.pods.pools.setNode("a", site{})
	return c
}

func (c *cluster) pod(name string) *corev1.Pod {
	c.t.Helper()
	var p corev1.Pod
	err := c.Get(c.t.Context(), types.NamespacedName{Namespace: "hearth", Name: name}, &p)
	if client.IgnoreNotFound(err) != nil {
		c.t.Fatal(err)
	}
	if err != nil {
		return nil
	}
	return &p
}

func (c *cluster) make(id string) {
	c.t.Helper()
	if _, err := c.pods.on("a", c.pool).CreateInstance(c.t.Context(), &hearthv1.CreateInstanceRequest{Id: id}); err != nil {
		c.t.Fatal(err)
	}
}

func size(n int32) *int32 { return &n }

// TestPodOfInstance: a pod is made for each Instance, for the WarmPool that lacks it, and goes with it or when it cannot be made.
func TestPodOfInstance(t *testing.T) {
	c := newCluster(t)
	c.pods.pools.SetPool(&crd.WarmPool{ObjectMeta: metav1.ObjectMeta{Name: "wp", UID: "u"}, Spec: crd.WarmPoolSpec{Size: size(1)}})
	c.make("i-1")
	c.make("i-2") // that somebody waits for
	p := c.pod("i-1")
	if nodeOf(p) != "a" || p.Labels[crd.LabelPool] != "wp" || len(p.OwnerReferences) != 1 || p.OwnerReferences[0].UID != "u" {
		t.Errorf("pod of the pool: %v %v", p.Labels, p.OwnerReferences)
	}
	if q := c.pod("i-2"); q.Labels[crd.LabelPool] != "" || q.OwnerReferences != nil {
		t.Errorf("pod of no pool: %v %v", q.Labels, q.OwnerReferences)
	}
	if s := p.Spec.SecurityContext; !*s.RunAsNonRoot || *p.Spec.AutomountServiceAccountToken || *p.Spec.Containers[0].SecurityContext.AllowPrivilegeEscalation {
		t.Errorf("pod is not restricted: %+v", p.Spec)
	}
	c.pool.instances["i-1"].State = hearthv1.State_STATE_SERVING // claimed, and its pod is not written yet
	c.make("i-5")
	if p := c.pod("i-5"); p.Labels[crd.LabelPool] != "wp" {
		t.Errorf("what takes the place of a claimed instance is of no pool: %v", p.Labels)
	}
	if s, ok := c.pods.pools.PoolStatus("wp"); !ok || s.Warm != 1 {
		t.Errorf("pool has %d warm instances, want the one that nobody has claimed", s.Warm)
	}
	c.pool.refuse = connect.NewError(connect.CodeInternal, errAway)
	if _, err := c.pods.on("a", c.pool).CreateInstance(t.Context(), &hearthv1.CreateInstanceRequest{Id: "i-3"}); err == nil || c.pod("i-3") != nil {
		t.Errorf("an instance that failed has a pod: %v", err)
	}
	for _, id := range []string{"i-1", "i-5"} {
		if err := c.pods.on("a", c.pool).Discard(t.Context(), &hearthv1.DiscardRequest{InstanceId: id}); err != nil || c.pod(id) != nil {
			t.Errorf("a discarded instance has a pod: %v", err)
		}
	}
	if c.pods.pools.enter("a", "", "i-4") == nil {
		t.Error("the pool does not lack what was discarded")
	}
}

// TestPodsAndInstancesInStep: what others delete is released once, what nobody is in goes once all is known, and the API server may be away.
func TestPodsAndInstancesInStep(t *testing.T) {
	c := newCluster(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
	for _, id := range []string{"i-1", "i-2", "i-3"} {
		c.make(id)
	}
	look := func(after time.Duration) {
		t.Helper()
		if err := c.pods.reconcile(t.Context(), time.Now().Add(after)); err != nil {
			t.Fatal(err)
		}
	}
	look(time.Hour)
	p := c.pod("i-1")
	p.Status.Phase = corev1.PodFailed
	if err := c.Status().Update(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	look(0)
	look(0)
	if !slices.Equal(c.pool.released, []string{"i-1"}) {
		t.Errorf("%v were released, want i-1 once", c.pool.released)
	}
	delete(c.pool.instances, "i-2")
	look(orphanTime / 2)
	if c.pod("i-2") == nil {
		t.Error("a pod was deleted whose instance may come yet")
	}
	c.pool.down = true
	look(time.Hour)
	if c.pod("i-2") == nil {
		t.Error("a pod was deleted on a node that has not told what it has")
	}
	c.pool.down, c.away = false, true
	if err := c.pods.on("a", c.pool).Discard(t.Context(), &hearthv1.DiscardRequest{InstanceId: "i-3"}); err != nil {
		t.Errorf("a discard failed because the API server is away: %v", err)
	}
	c.away = false
	look(time.Hour)
	if c.pod("i-2") != nil || c.pod("i-3") != nil || c.pod("i-1") == nil {
		t.Error("pods without instances are there, or one with an instance is not")
	}
}

// TestAdoption: a claim costs two writes, however often it is looked at, and none while the API server is away.
func TestAdoption(t *testing.T) {
	cpu, memory := resource.MustParse("500m"), resource.MustParse("256Mi")
	c := newCluster(t, &crd.Revision{ObjectMeta: metav1.ObjectMeta{Namespace: "hearth", Name: "f-00001", UID: "r"},
		Spec: crd.RevisionSpec{Function: "f", Image: "image", Resources: crd.Resources{CPU: &cpu, Memory: &memory}}})
	c.pods.pools.SetPool(&crd.WarmPool{ObjectMeta: metav1.ObjectMeta{Name: "wp", UID: "u"}, Spec: crd.WarmPoolSpec{Size: size(1)}})
	c.make("i-1")
	a := newAdopter(c.pods)
	defer a.queue.ShutDown()
	c.writes.Store(0)
	if err := a.adopt(t.Context(), "i-1"); err != nil || c.writes.Load() != 0 {
		t.Errorf("%d writes for what nobody claimed: %v", c.writes.Load(), err)
	}
	i := c.pool.instances["i-1"]
	i.State, i.Function, i.Revision = hearthv1.State_STATE_SERVING, "f", "f-00001"
	c.away = true
	if err := a.adopt(t.Context(), "i-1"); err == nil {
		t.Error("the API server is away, and nothing is to be tried again")
	}
	c.away = false
	for range 3 {
		if err := a.adopt(t.Context(), "i-1"); err != nil {
			t.Fatal(err)
		}
	}
	p := c.pod("i-1")
	has := p.Spec.Containers[0].Resources.Requests
	if c.writes.Load() != 2 {
		t.Errorf("%d writes, want 2", c.writes.Load())
	}
	if p.Labels[crd.LabelFunction] != "f" || p.Labels[crd.LabelRevision] != "f-00001" || p.Labels[crd.LabelPool] != "" {
		t.Errorf("labels %v", p.Labels)
	}
	if len(p.OwnerReferences) != 1 || p.OwnerReferences[0].UID != "r" || !has.Cpu().Equal(cpu) || !has.Memory().Equal(memory) {
		t.Errorf("owners %v, requests %v", p.OwnerReferences, has)
	}
}

// TestAdoptionIsMerged: nothing is written with the claim, and what changes often is written once.
func TestAdoptionIsMerged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, &crd.Revision{ObjectMeta: metav1.ObjectMeta{Namespace: "hearth", Name: "f-00001", UID: "r"}, Spec: crd.RevisionSpec{Function: "f", Image: "image"}})
		c.make("i-1")
		i := c.pool.instances["i-1"]
		i.State, i.Function, i.Revision = hearthv1.State_STATE_SERVING, "f", "f-00001"
		c.writes.Store(0)
		a := newAdopter(c.pods)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); a.run(ctx) }()
		for range 20 {
			a.changed("i-1")
			time.Sleep(adoptDelay / 50)
		}
		if c.writes.Load() != 0 {
			t.Errorf("%d writes within moments of the claim", c.writes.Load())
		}
		time.Sleep(time.Minute)
		if c.writes.Load() != 1 { // nothing to resize
			t.Errorf("%d writes, want 1", c.writes.Load())
		}
		cancel()
		<-done
	})
}

// TestHeadroom: as many placeholders as are asked for, however often it is looked.
func TestHeadroom(t *testing.T) {
	c := newCluster(t)
	wanted := func(n int32) int {
		c.pods.pools.SetPool(&crd.WarmPool{ObjectMeta: metav1.ObjectMeta{Name: "wp", UID: "u", Generation: int64(n)}, Spec: crd.WarmPoolSpec{Size: size(1), Headroom: n}})
		for range 3 {
			if err := c.pods.headroom(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		var all corev1.PodList
		if err := c.List(t.Context(), &all, client.HasLabels{placeholderLabel}); err != nil {
			t.Fatal(err)
		}
		return len(all.Items)
	}
	for _, n := range []int32{3, 1, 0} {
		if got := wanted(n); got != int(n) {
			t.Errorf("%d placeholders, want %d", got, n)
		}
	}
}

// TestNodesFollowTheCluster: a node comes with its first nodeagent that is ready, stays while that is replaced, and goes with the node.
func TestNodesFollowTheCluster(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: TaintNotReady, Effect: corev1.TaintEffectNoSchedule}}}}
	agent := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "hearth-system", Name: "agent", Labels: map[string]string{componentLabel: NodeagentComponent}},
		Spec: corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{HostIP: "10.0.0.1"}}
	c := newCluster(t, node, agent)
	n := &nodes{api: c, manager: c.pool, pools: c.pods.pools, pods: c.pods, namespace: "hearth-system", port: DefaultNodePort,
		dial: func(string) *http.Client { return http.DefaultClient }, log: c.pods.log, known: map[string]knownNode{}}
	look := func(want ...string) {
		t.Helper()
		c.pool.told = nil
		for range 2 {
			if err := n.reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if !slices.Equal(c.pool.told, want) {
			t.Errorf("the manager was told %q, want %q", c.pool.told, want)
		}
	}
	change := func(o client.Object, what func()) {
		t.Helper()
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			t.Fatal(err)
		}
		what()
		if err := c.Update(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		what() // the update has brought back the status
		if err := c.Status().Update(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	ready := func(s corev1.ConditionStatus) func() {
		return func() {
			agent.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: s}}
		}
	}
	taints := func() []corev1.Taint {
		t.Helper()
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(node), node); err != nil {
			t.Fatal(err)
		}
		return node.Spec.Taints
	}
	look()
	if len(taints()) != 1 {
		t.Error("a node on which nodeagent is not ready lost its taint")
	}
	change(agent, ready(corev1.ConditionTrue))
	look("add n1 false")
	if left := taints(); len(left) != 0 {
		t.Errorf("a node on which nodeagent serves has taints %v", left)
	}
	change(agent, ready(corev1.ConditionFalse))
	look()
	change(node, func() { node.Spec.Unschedulable = true })
	look("update n1 true")
	change(agent, func() { ready(corev1.ConditionTrue)(); agent.Status.HostIP = "10.0.0.2" })
	look("remove n1", "add n1 true")
	if err := c.Client.Delete(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	look("remove n1")
}
