package scale_test

import (
	"context"
	"fmt"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	ctrlcache "sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/internal/kube"
)

const (
	zoneLabel = "topology.kubernetes.io/zone"
	// beat is how often a kubelet renews its Lease.
	beat = 10 * time.Second
	// kubeletWorkers write the statuses of all nodes' pods.
	kubeletWorkers = 16
)

// kubelets are those of all nodes: what is bound to a node runs, and what is to end is gone.
type kubelets struct {
	api    client.Client
	seen   ctrlcache.Cache
	nodes  []*fakeNode
	byName map[string]*fakeNode
	queue  workqueue.TypedRateLimitingInterface[client.ObjectKey]

	mu      sync.Mutex               // guards running
	running map[string]chan struct{} // closed when the pod runs
}

// fakeNode is one of the cluster's nodes.
type fakeNode struct {
	name, zone, address string
	agent               *agent
}

func newKubelets(api client.Client, seen ctrlcache.Cache) *kubelets {
	return &kubelets{api: api, seen: seen, running: map[string]chan struct{}{}, byName: map[string]*fakeNode{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[client.ObjectKey](10*time.Millisecond, time.Second))}
}

func (k *kubelets) runs(pod string) chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.running[pod] == nil {
		k.running[pod] = make(chan struct{})
	}
	return k.running[pod]
}

// sandbox waits until a pod of Instances runs.
func (k *kubelets) sandbox(ctx context.Context, pod string) error {
	select {
	case <-k.runs(pod):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// register makes a node, ready, and its nodeagent's pod.
func (k *kubelets) register(ctx context.Context, n *fakeNode) error {
	many := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("16"), corev1.ResourceMemory: resource.MustParse("64Gi"), corev1.ResourcePods: resource.MustParse("110")}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.name, Labels: map[string]string{
		"kubernetes.io/hostname": n.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", zoneLabel: n.zone}}}
	if err := k.api.Create(ctx, node); err != nil {
		return err
	}
	now := metav1.Now()
	node.Status = corev1.NodeStatus{Capacity: many, Allocatable: many, Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: n.address}},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", LastHeartbeatTime: now, LastTransitionTime: now}}}
	if err := k.api.Status().Update(ctx, node); err != nil {
		return err
	}
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: n.name}, Spec: coordinationv1.LeaseSpec{HolderIdentity: &n.name}}
	if err := k.api.Create(ctx, lease); err != nil {
		return err
	}
	return k.api.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: system, Name: "nodeagent-" + n.name, Labels: map[string]string{"app.kubernetes.io/component": kube.NodeagentComponent}},
		Spec:       corev1.PodSpec{NodeName: n.name, Containers: []corev1.Container{{Name: "nodeagent", Image: "hearth/nodeagent"}}},
	})
}

// run keeps the kubelets' part until ctx is done.
func (k *kubelets) run(ctx context.Context) error {
	pods, err := k.seen.GetInformer(ctx, &corev1.Pod{})
	if err != nil {
		return err
	}
	heard := func(o any) {
		if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
			o = gone.Obj
		}
		if p, ok := o.(*corev1.Pod); ok && p.Spec.NodeName != "" && (p.Status.Phase == corev1.PodPending || p.DeletionTimestamp != nil) {
			k.queue.Add(client.ObjectKeyFromObject(p))
		}
	}
	if _, err := pods.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: heard, UpdateFunc: func(_, o any) { heard(o) }}); err != nil {
		return err
	}
	var work sync.WaitGroup
	defer work.Wait()
	defer k.queue.ShutDown()
	for range kubeletWorkers {
		work.Go(func() { k.work(ctx) })
	}
	for n := 0; host.Pause(ctx, beat/time.Duration(len(k.nodes))); n++ {
		k.beat(ctx, k.nodes[n%len(k.nodes)])
	}
	return nil
}

// beat renews a node's Lease. A failure is the next beat's to put right.
func (k *kubelets) beat(ctx context.Context, n *fakeNode) {
	now := metav1.NowMicro()
	patch := fmt.Appendf(nil, `{"spec":{"renewTime":%q}}`, now.UTC().Format(metav1.RFC3339Micro))
	_ = k.api.Patch(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: n.name}}, client.RawPatch(mergePatch, patch))
}

func (k *kubelets) work(ctx context.Context) {
	for {
		key, ended := k.queue.Get()
		if ended {
			return
		}
		if err := k.bring(ctx, key); err != nil && ctx.Err() == nil {
			k.queue.AddRateLimited(key)
		} else {
			k.queue.Forget(key)
		}
		k.queue.Done(key)
	}
}

// bring does for one pod what the kubelet of its node would.
func (k *kubelets) bring(ctx context.Context, key client.ObjectKey) error {
	var pod corev1.Pod
	if err := k.seen.Get(ctx, key, &pod); err != nil {
		return client.IgnoreNotFound(err)
	}
	if pod.DeletionTimestamp != nil {
		return client.IgnoreNotFound(k.api.Delete(ctx, &pod, client.GracePeriodSeconds(0)))
	}
	if pod.Status.Phase != corev1.PodPending {
		return nil
	}
	host := k.byName[pod.Spec.NodeName].address
	now := metav1.Now()
	pod.Status.Phase, pod.Status.StartTime, pod.Status.HostIP, pod.Status.PodIP = corev1.PodRunning, &now, host, host
	pod.Status.HostIPs, pod.Status.PodIPs = []corev1.HostIP{{IP: host}}, []corev1.PodIP{{IP: host}}
	pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: now})
	err := k.api.Status().Update(ctx, &pod)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err == nil && pod.Labels[crd.LabelInstance] != "" {
		close(k.runs(pod.Name))
	}
	return err
}
