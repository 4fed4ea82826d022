package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// adoptDelay is how long after an Instance changed its pod is written: its first requests have the API server's and our cores to
	// themselves, and what changes twice is written once.
	adoptDelay = time.Second
	// adoptRate is how many pods are written in a second; a claim takes at most two writes.
	adoptRate, adoptBurst = 20, 20
	adoptFirst, adoptMost = time.Second, 30 * time.Second
	groupLabel            = "hearth.dev/group"
)

// adopter makes the pod of a claimed Instance a normal pod of its Function: labelled, owned by the Revision, and with the Function's
// resources. It follows claims and is in nobody's way: merged, limited, tried again when the API server is back.
type adopter struct {
	pods  *pods
	queue workqueue.TypedRateLimitingInterface[string]
	limit *rate.Limiter
	log   *slog.Logger
}

func newAdopter(p *pods) *adopter {
	backoff := workqueue.NewTypedItemExponentialFailureRateLimiter[string](adoptFirst, adoptMost)
	return &adopter{pods: p, queue: workqueue.NewTypedRateLimitingQueue(backoff), limit: rate.NewLimiter(adoptRate, adoptBurst), log: p.log}
}

// changed takes in that an Instance changed. It does not block.
func (a *adopter) changed(instance string) { a.queue.AddAfter(instance, adoptDelay) }

// run works until ctx is done.
func (a *adopter) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, a.queue.ShutDown)
	defer stop()
	for {
		id, ended := a.queue.Get()
		if ended {
			return
		}
		if err := a.adopt(ctx, id); err != nil && ctx.Err() == nil {
			a.log.Debug("write a claimed instance's pod; it is tried again", "instance", id, "err", err)
			a.queue.AddRateLimited(id)
		} else {
			a.queue.Forget(id)
		}
		a.queue.Done(id)
	}
}

// adopt brings the pod that an Instance is in up to date with it, with as few writes as that takes: none if there is nothing to say.
func (a *adopter) adopt(ctx context.Context, id string) error {
	i := a.pods.manager.Instance(id)
	if i.GetFunction() == "" {
		return nil // gone, or nobody's
	}
	ctx, cancel := context.WithTimeout(ctx, podCall)
	defer cancel()
	var pod corev1.Pod
	key := types.NamespacedName{Namespace: a.pods.namespace, Name: cmp.Or(i.GetPod(), id)}
	if err := a.pods.api.Get(ctx, key, &pod); err != nil {
		return client.IgnoreNotFound(err)
	}
	inside := slices.DeleteFunc(a.pods.manager.InPod(pod.Name), func(i *hearthv1.Instance) bool { return i.GetFunction() == "" })
	revisions, err := a.revisions(ctx, inside)
	if err != nil || len(revisions) == 0 {
		return err
	}
	if patch := metadataPatch(&pod, inside, revisions); patch != nil {
		if err := a.write(ctx, &pod, patch, ""); err != nil {
			return fmt.Errorf("label pod %s: %w", pod.Name, err)
		}
	}
	if patch := resizePatch(&pod, revisions); patch != nil {
		if err := a.write(ctx, &pod, patch, "resize"); err != nil {
			return fmt.Errorf("resize pod %s: %w", pod.Name, err)
		}
	}
	return nil
}

func (a *adopter) write(ctx context.Context, pod *corev1.Pod, patch []byte, subresource string) (err error) {
	if err := a.limit.Wait(ctx); err != nil {
		return err
	}
	target := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	if subresource == "" {
		err = a.pods.api.Patch(ctx, target, client.RawPatch(types.MergePatchType, patch))
	} else {
		err = a.pods.api.SubResource(subresource).Patch(ctx, target, client.RawPatch(types.StrategicMergePatchType, patch))
	}
	if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
		// Another try would end so too: a quota is exhausted, or the node has not so much to give.
		a.log.Warn("the API server refuses what a claimed instance's pod should be", "instance", pod.Name, "subresource", subresource, "err", err)
		return nil
	}
	return client.IgnoreNotFound(err)
}

// revisions are those of what is in a pod. One that is not there any more owns nothing.
func (a *adopter) revisions(ctx context.Context, inside []*hearthv1.Instance) ([]*crd.Revision, error) {
	var all []*crd.Revision
	for _, i := range inside {
		r := &crd.Revision{}
		err := a.pods.api.Get(ctx, types.NamespacedName{Namespace: a.pods.namespace, Name: i.GetRevision()}, r)
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if r.Spec.Function == i.GetFunction() {
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(x, y *crd.Revision) int { return cmp.Compare(x.Name, y.Name) })
	return all, nil
}

// metadataPatch says whose a pod is, or is nil if it says so already. A pod that a group shares belongs to all that are in it, and ends
// when none of them is left.
func metadataPatch(pod *corev1.Pod, inside []*hearthv1.Instance, revisions []*crd.Revision) []byte {
	labels := map[string]any{}
	if inside[0].GetGroup() != "" {
		labels[groupLabel] = inside[0].GetGroup()
	} else {
		labels[crd.LabelFunction], labels[crd.LabelRevision] = revisions[0].Spec.Function, revisions[0].Name
	}
	labels[crd.LabelPool] = nil
	maps.DeleteFunc(labels, func(name string, value any) bool {
		is, has := pod.Labels[name]
		return value == nil && !has || value != nil && has && is == value
	})
	var owners []metav1.OwnerReference
	for _, r := range revisions {
		o := ownedBy("Revision", r.Name, r.UID)
		if len(revisions) > 1 {
			o.Controller = nil // there can be one only
		}
		owners = append(owners, o)
	}
	same := slices.EqualFunc(owners, pod.OwnerReferences, func(x, y metav1.OwnerReference) bool { return x.UID == y.UID })
	if len(labels) == 0 && same {
		return nil
	}
	meta := map[string]any{"labels": labels}
	if !same {
		meta["ownerReferences"] = owners
	}
	return encode(map[string]any{"metadata": meta})
}

// resizePatch gives the pod's container what its Functions ask for, so that the scheduler and quotas count that; nil if it has it. Limits
// are not set: nodeagent holds each Function to its own, in cgroups of its own, and the pod's quality of service must stay what it was.
func resizePatch(pod *corev1.Pod, revisions []*crd.Revision) []byte {
	if len(pod.Spec.Containers) != 1 {
		return nil
	}
	total := corev1.ResourceList{}
	for _, r := range revisions {
		for name, q := range requestsOf(r.Spec.Resources) {
			sum := total[name]
			sum.Add(q)
			total[name] = sum
		}
	}
	has := pod.Spec.Containers[0].Resources.Requests
	maps.DeleteFunc(total, func(name corev1.ResourceName, q resource.Quantity) bool { is := has[name]; return is.Cmp(q) == 0 })
	if len(total) == 0 {
		return nil
	}
	return encode(map[string]any{"spec": map[string]any{"containers": []any{map[string]any{
		"name": holder, "resources": map[string]any{"requests": total}}}}})
}

func encode(v any) []byte {
	out, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings
	}
	return out
}
