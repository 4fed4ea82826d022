package kube

import (
	"cmp"
	"context"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

// revisions says of each Revision whether its bytes are fixed. Who makes and deletes them is Store.
type revisions struct{ objects }

func addRevisions(m manager.Manager, r *revisions) error {
	return builder.ControllerManagedBy(m).For(&crd.Revision{}).WithOptions(options(2)).Complete(r)
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
	return reconcile.Result{}, r.writeStatus(ctx, before, &rev)
}
