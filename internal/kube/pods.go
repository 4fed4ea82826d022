package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"time"

	"connectrpc.com/connect"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

const (
	// holder is the only container that the kubelet makes in an Instance's pod: nodeagent adds the others under the pod's cgroup.
	holder = "function"
	// graceSeconds is what somebody else's deletion of a pod leaves for its requests, of which the holder stays for lingerSeconds. Our own
	// deletions follow the Instance's end and wait for nothing.
	graceSeconds, lingerSeconds = 30, 25
	// orphanTime is how old a pod is at least that is deleted because no Instance is in it: until then one may be about to be.
	orphanTime = 2 * time.Minute
	podCall    = 10 * time.Second
)

// instances is the pool.Manager as far as its pods are concerned.
type instances interface {
	// Instance is nil for an id that none has.
	Instance(id string) *hearthv1.Instance
	InPod(pod string) []*hearthv1.Instance
	NodeUp(name string) bool
	Release(context.Context, *connect.Request[hearthv1.ReleaseRequest]) (*connect.Response[hearthv1.ReleaseResponse], error)
}

// pods makes the pods that Instances are in, one each, of the Instance's name, and keeps them and the Instances in step. The pool decides
// how many there are, under names that are never used twice; so that however late a cache is, nothing is made for the same reason twice.
type pods struct {
	api       client.Client // reads from a cache
	live      client.Reader // reads from the API server
	manager   instances
	pools     *Pools
	namespace string
	image     string // of the holder
	requests  corev1.ResourceList
	log       *slog.Logger
}

// podNode is a node of the cluster as the pool sees it: its nodeagent, and pods beside.
type podNode struct {
	pool.Node
	name string
	pods *pods
}

func (p *pods) on(node string, agent pool.Node) pool.Node { return &podNode{agent, node, p} }

// CreateInstance has nodeagent make an Instance while the kubelet makes the sandbox that it waits for.
func (n *podNode) CreateInstance(ctx context.Context, r *hearthv1.CreateInstanceRequest) (*hearthv1.Instance, error) {
	if r.GetPod() != "" {
		return n.Node.CreateInstance(ctx, r) // in a pod that is there
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type result struct {
		instance *hearthv1.Instance
		err      error
	}
	made := make(chan result, 1)
	go func() {
		i, err := n.Node.CreateInstance(ctx, r)
		made <- result{i, err}
	}()
	if err := n.pods.create(ctx, n.name, r); err != nil {
		cancel(err)
		<-made
		n.pods.clear(context.WithoutCancel(ctx), n.name, r.GetId())
		return nil, err
	}
	got := <-made
	if got.err != nil {
		got.err = n.pods.explain(context.WithoutCancel(ctx), r.GetId(), got.err)
		n.pods.clear(context.WithoutCancel(ctx), n.name, r.GetId())
	}
	return got.instance, got.err
}

// Discard ends an Instance, and then its pod. That the API server is away keeps nobody: reconcile deletes the pod later.
func (n *podNode) Discard(ctx context.Context, r *hearthv1.DiscardRequest) error {
	shared := n.pods.manager.Instance(r.GetInstanceId()).GetGroup() != ""
	if err := n.Node.Discard(ctx, r); err != nil {
		return err
	}
	if !shared { // others may be in it
		n.pods.clear(ctx, n.name, r.GetInstanceId())
	}
	return nil
}

func (p *pods) create(ctx context.Context, node string, r *hearthv1.CreateInstanceRequest) error {
	ctx, cancel := context.WithTimeout(ctx, podCall)
	defer cancel()
	w := p.pools.enter(node, r.GetRuntime().GetName(), r.GetId())
	err := p.api.Create(ctx, p.podFor(node, r.GetId(), r.GetRuntime().GetName(), w))
	switch {
	case err == nil || apierrors.IsAlreadyExists(err):
		return nil
	case apierrors.IsForbidden(err) || apierrors.IsInvalid(err):
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the API server refuses the pod of instance %s: %w", r.GetId(), err))
	}
	return connect.NewError(connect.CodeUnavailable, fmt.Errorf("create the pod of instance %s: %w", r.GetId(), err))
}

// clear deletes a pod in which nothing is any more.
func (p *pods) clear(ctx context.Context, node, id string) {
	p.pools.leave(node, id)
	ctx, cancel := context.WithTimeout(ctx, podCall)
	defer cancel()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: id}}
	if err := p.api.Delete(ctx, pod, client.GracePeriodSeconds(0)); err != nil && !apierrors.IsNotFound(err) {
		p.log.Warn("delete a pod; it is tried again", "instance", id, "err", err)
	}
}

// explain adds to an error of nodeagent what the scheduler or the kubelet says of the pod: it waited for a sandbox that did not come.
func (p *pods) explain(ctx context.Context, id string, err error) error {
	ctx, cancel := context.WithTimeout(ctx, podCall)
	defer cancel()
	var pod corev1.Pod
	if p.live.Get(ctx, types.NamespacedName{Namespace: p.namespace, Name: id}, &pod) != nil {
		return err
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("the pod of instance %s is not scheduled: %s", id, c.Message))
		}
	}
	for _, s := range pod.Status.ContainerStatuses {
		if w := s.State.Waiting; w != nil && w.Message != "" {
			return connect.NewError(connect.CodeOf(err), fmt.Errorf("%w; the kubelet says of its pod: %s: %s", err, w.Reason, w.Message))
		}
	}
	return err
}

// podFor is the pod of an Instance that nobody has claimed. It is as restricted as a pod can be: what runs in it later is nodeagent's to
// restrict.
func (p *pods) podFor(node, id, runtime string, w *crd.WarmPool) *corev1.Pod {
	yes, no, user, grace := true, false, int64(65534), int64(graceSeconds)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: id, Labels: map[string]string{
			nameLabel: "hearth-instance", managedLabel: managedBy, crd.LabelInstance: id,
		}},
		Spec: corev1.PodSpec{
			Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
				NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{
					{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{node}}}}}}}},
			RestartPolicy:                 corev1.RestartPolicyNever,
			TerminationGracePeriodSeconds: &grace,
			AutomountServiceAccountToken:  &no,
			EnableServiceLinks:            &no,
			SecurityContext: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &user, RunAsGroup: &user,
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
			Containers: []corev1.Container{{
				Name: holder, Image: p.image,
				Resources: corev1.ResourceRequirements{Requests: maps.Clone(p.requests)},
				SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
					Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}},
				// Whoever else deletes the pod lets its requests end: the sandbox stays up while this sleeps.
				Lifecycle: &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: lingerSeconds}}},
			}},
		},
	}
	if runtime != "" {
		pod.Labels[runtimeLabel] = runtime
	}
	if w != nil {
		pod.Labels[crd.LabelPool] = w.Name
		pod.OwnerReferences = []metav1.OwnerReference{ownedBy("WarmPool", w.Name, w.UID)}
		pod.Spec.Tolerations = w.Spec.Tolerations
		maps.Copy(pod.Spec.Containers[0].Resources.Requests, requestsOf(w.Spec.Resources))
	}
	return pod
}

const (
	runtimeLabel = "hearth.dev/runtime"
	managedLabel = "app.kubernetes.io/managed-by"
	managedBy    = "hearth-poolmanager"
)

func ownedBy(kind, name string, uid types.UID) metav1.OwnerReference {
	yes := true
	return metav1.OwnerReference{APIVersion: crd.GroupVersion.String(), Kind: kind, Name: name, UID: uid, Controller: &yes}
}

func requestsOf(r crd.Resources) corev1.ResourceList {
	out := corev1.ResourceList{}
	if r.CPU != nil {
		out[corev1.ResourceCPU] = *r.CPU
	}
	if r.Memory != nil {
		out[corev1.ResourceMemory] = *r.Memory
	}
	return out
}

// reconcile brings pods and Instances in step: what somebody else deletes or evicts is released, what nobody is in is deleted.
func (p *pods) reconcile(ctx context.Context, now time.Time) error {
	var all corev1.PodList
	if err := p.api.List(ctx, &all, client.InNamespace(p.namespace), client.HasLabels{crd.LabelInstance}, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("list pods of instances: %w", err)
	}
	var errs []error
	for i := range all.Items {
		errs = append(errs, p.judge(ctx, now, &all.Items[i]))
	}
	return errors.Join(errs...)
}

// judge does what one pod needs. The pod is the cache's.
func (p *pods) judge(ctx context.Context, now time.Time, pod *corev1.Pod) error {
	node, inside := nodeOf(pod), p.manager.InPod(pod.Name)
	if name := pod.Labels[crd.LabelPool]; name != "" && len(inside) > 0 && inside[0].GetState() <= hearthv1.State_STATE_WARM {
		p.pools.waiting(name, node, pod.Name)
	} else {
		p.pools.leave(node, pod.Name)
	}
	ends := pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded
	if len(inside) > 0 {
		if ends {
			return p.release(ctx, pod, inside)
		}
		return nil
	}
	if !ends && now.Sub(pod.CreationTimestamp.Time) < orphanTime || !p.accounted(ctx, node) {
		return nil
	}
	p.log.Info("delete a pod without an instance", "pod", pod.Name, "node", node)
	p.clear(ctx, node, pod.Name)
	return nil
}

// release gives up what is in a pod that ends: its requests end, and it is started elsewhere if it is needed.
func (p *pods) release(ctx context.Context, pod *corev1.Pod, inside []*hearthv1.Instance) (err error) {
	for _, i := range inside {
		if i.GetState() == hearthv1.State_STATE_DRAINING {
			continue
		}
		p.log.Info("release an instance whose pod ends", "instance", i.GetId(), "function", i.GetFunction(), "reason", pod.Status.Reason)
		_, failed := p.manager.Release(ctx, connect.NewRequest(&hearthv1.ReleaseRequest{InstanceId: i.GetId()}))
		err = errors.Join(err, failed)
	}
	return err
}

// accounted says whether all that is on a node is known: it has told, or it is no more.
func (p *pods) accounted(ctx context.Context, node string) bool {
	if p.manager.NodeUp(node) {
		return true
	}
	return apierrors.IsNotFound(p.api.Get(ctx, types.NamespacedName{Name: node}, &corev1.Node{}))
}

// nodeOf is where a pod is, or has to be.
func nodeOf(pod *corev1.Pod) string {
	if pod.Spec.NodeName != "" {
		return pod.Spec.NodeName
	}
	if a := pod.Spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		for _, t := range a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
			if len(t.MatchFields) == 1 && len(t.MatchFields[0].Values) == 1 {
				return t.MatchFields[0].Values[0]
			}
		}
	}
	return ""
}
