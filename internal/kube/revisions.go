package kube

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

const (
	// keepRevisions of a Function that are the newest, to look at what was before.
	keepRevisions = 3
	// keepSuperseded is how long one is kept after the next was made, whatever their number: claims of it may still be on the way to
	// their pods, which it owns.
	keepSuperseded = 10 * time.Minute

	functionIndex = "spec.function"
)

// revisions says of each Revision whether its bytes are fixed, and takes away the old ones that own nothing.
type revisions struct {
	objects
	now func() time.Time
}

func addRevisions(m manager.Manager, r *revisions) error {
	if err := m.GetFieldIndexer().IndexField(context.Background(), &crd.Revision{}, functionIndex, functionOf); err != nil {
		return err
	}
	return builder.ControllerManagedBy(m).For(&crd.Revision{}).WithOptions(options(2)).Complete(r)
}

func functionOf(o client.Object) []string {
	if r, ok := o.(*crd.Revision); ok {
		return []string{r.Spec.Function}
	}
	return nil
}

// Reconcile looks at one Revision.
func (r *revisions) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var rev crd.Revision
	if there, err := r.get(ctx, req.NamespacedName, &rev); err != nil || !there {
		return reconcile.Result{}, err
	}
	before := rev.DeepCopy()
	ready := verdict{metav1.ConditionUnknown, "Unresolved", "the first node that fetches the image resolves it to a digest", false}
	if rev.Spec.Code != nil || strings.Contains(cmp.Or(rev.Status.Image, rev.Spec.Image), "@sha256:") {
		ready = yes("Resolved", "every instance runs the same bytes")
	}
	rev.Status.ObservedGeneration = rev.Generation
	r.judge(&rev, &rev.Status.Conditions, crd.ConditionReady, ready)
	if err := r.writeStatus(ctx, before, &rev); err != nil {
		return reconcile.Result{}, err
	}
	return r.prune(ctx, rev.Namespace, rev.Spec.Function)
}

// prune deletes Revisions of a Function that newer ones have superseded for a while and that own no pod.
func (r *revisions) prune(ctx context.Context, namespace, function string) (reconcile.Result, error) {
	var list crd.RevisionList
	if err := r.List(ctx, &list, client.InNamespace(namespace), client.MatchingFields{functionIndex: function}); err != nil {
		return reconcile.Result{}, fmt.Errorf("list revisions of %s: %w", function, err)
	}
	all := list.Items
	slices.SortFunc(all, func(a, b crd.Revision) int { // the newest first; numbers may grow beyond their five digits
		return cmp.Or(cmp.Compare(len(b.Name), len(a.Name)), cmp.Compare(b.Name, a.Name))
	})
	var result reconcile.Result
	for n := keepRevisions; n < len(all); n++ {
		left := all[n-1].CreationTimestamp.Add(keepSuperseded).Sub(r.now())
		if left <= 0 {
			owns, err := r.ownsPods(ctx, &all[n])
			if err == nil && !owns {
				err = client.IgnoreNotFound(r.Delete(ctx, &all[n], client.Preconditions{UID: &all[n].UID}))
			}
			if err != nil {
				return reconcile.Result{}, fmt.Errorf("delete revision %s: %w", all[n].Name, err)
			}
			if !owns {
				continue
			}
			left = keepSuperseded
		}
		if result.RequeueAfter == 0 || left < result.RequeueAfter {
			result.RequeueAfter = left
		}
	}
	return result, nil
}

// ownsPods asks the API server and no cache: its pods would go with it.
func (r *revisions) ownsPods(ctx context.Context, rev *crd.Revision) (bool, error) {
	pods := &metav1.PartialObjectMetadataList{}
	pods.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("PodList"))
	err := r.live.List(ctx, pods, client.InNamespace(rev.Namespace), client.MatchingLabels{crd.LabelRevision: rev.Name}, client.Limit(1))
	return len(pods.Items) > 0, err
}
