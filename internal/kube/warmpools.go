package kube

import (
	"context"
	"fmt"

	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

// warmPools keeps the sizes of the pool as the custom resources say.
type warmPools struct {
	objects
	pool WarmPools
}

func (c Controllers) addWarmPools(m manager.Manager, r *warmPools) error {
	look := func(context.Context) (map[string]PoolStatus, error) {
		states := map[string]PoolStatus{}
		for _, name := range c.Pools.PoolNames() {
			states[name], _ = c.Pools.PoolStatus(name)
		}
		return states, nil
	}
	return control(m, c.Namespace, &crd.WarmPool{}, 1, r, look, nil)
}

// Reconcile takes over one WarmPool, and writes what became of it.
func (r *warmPools) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var wp crd.WarmPool
	there, err := r.get(ctx, req.NamespacedName, &wp)
	if err != nil {
		return reconcile.Result{}, err
	}
	if !there {
		r.pool.DeletePool(req.Name)
		return reconcile.Result{}, nil
	}
	r.pool.SetPool(wp.DeepCopy())
	before := wp.DeepCopy()
	s, _ := r.pool.PoolStatus(wp.Name)
	r.describe(&wp, s)
	return reconcile.Result{}, r.writeStatus(ctx, before, &wp)
}

// describe writes a WarmPool's status. Ready once it was full, it stays so while anything waits: every claim takes one for a moment.
func (r *warmPools) describe(wp *crd.WarmPool, s PoolStatus) {
	st := &wp.Status
	was := st.ObservedGeneration == wp.Generation && apimeta.IsStatusConditionTrue(st.Conditions, crd.ConditionReady)
	st.ObservedGeneration, st.Size, st.Selector = wp.Generation, wp.Spec.Instances(), crd.LabelPool+"="+wp.Name
	st.Nodes, st.Warm, st.Desired = int32(s.Nodes), int32(s.Warm), int32(s.Desired)
	ready := notYet("Filling", "instances are being made")
	switch {
	case s.Error != "":
		ready = fault("Failing", s.Error)
	case s.Nodes == 0:
		ready = fault("NoNodes", fmt.Sprintf("no node that runs nodeagent has the labels %v", wp.Spec.NodeSelector))
	case s.Warm >= s.Desired || was && s.Warm > 0:
		ready = yes("Stocked", "instances wait on every node")
	}
	r.judge(wp, &st.Conditions, crd.ConditionAccepted, accepted())
	r.judge(wp, &st.Conditions, crd.ConditionReady, ready)
}
