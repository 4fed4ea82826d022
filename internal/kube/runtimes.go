package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// runtimes keeps the pool's Runtimes as the custom resources say.
type runtimes struct {
	objects
	pool    Runtimes
	applied map[string]string // what the pool was given of each in this term; one worker only
}

// runtimeState is what a status says.
type runtimeState struct {
	image, err, language string
	warm                 int32
}

func (c Controllers) addRuntimes(m manager.Manager, r *runtimes) error {
	look := func(ctx context.Context) (map[string]runtimeState, error) {
		list, err := c.Runtimes.ListRuntimes(ctx, connect.NewRequest(&hearthv1.ListRuntimesRequest{}))
		if err != nil {
			return nil, err
		}
		states := map[string]runtimeState{}
		for _, rt := range list.Msg.GetRuntimes() {
			states[rt.GetName()] = runtimeState{rt.GetImage(), rt.GetStatus().GetError(), rt.GetStatus().GetLanguage(), rt.GetStatus().GetWarm()}
		}
		return states, nil
	}
	return control(m, c.Namespace, &crd.Runtime{}, 1, r, look, nil)
}

// Reconcile takes over one Runtime, and writes what became of it.
func (r *runtimes) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var rt crd.Runtime
	there, err := r.get(ctx, req.NamespacedName, &rt)
	if err != nil {
		return reconcile.Result{}, err
	}
	if !there {
		return r.remove(ctx, req.Name)
	}
	now, accepted, err := r.apply(ctx, &rt)
	if err != nil {
		return reconcile.Result{}, err
	}
	before := rt.DeepCopy()
	r.describe(&rt, now, accepted)
	return reconcile.Result{}, r.writeStatus(ctx, before, &rt)
}

// remove has the pool forget a Runtime as soon as no Function needs it any more.
func (r *runtimes) remove(ctx context.Context, name string) (reconcile.Result, error) {
	delete(r.applied, name)
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	_, err := r.pool.DeleteRuntime(ctx, connect.NewRequest(&hearthv1.DeleteRuntimeRequest{Name: name}))
	switch {
	case err == nil || goesOn(err) || connect.CodeOf(err) == connect.CodeNotFound:
		return reconcile.Result{}, nil
	case connect.CodeOf(err) == connect.CodeFailedPrecondition:
		return reconcile.Result{RequeueAfter: tryAgain}, nil
	}
	return reconcile.Result{}, fmt.Errorf("delete runtime %s: %w", name, err)
}

// apply has the pool take over a Runtime, and returns what the pool says of it. It is done once: to be given one again that does not
// boot makes the pool forget why.
func (r *runtimes) apply(ctx context.Context, rt *crd.Runtime) (*hearthv1.Runtime, verdict, error) {
	list, err := r.pool.ListRuntimes(ctx, connect.NewRequest(&hearthv1.ListRuntimesRequest{}))
	if err != nil {
		return nil, verdict{}, fmt.Errorf("list runtimes: %w", err)
	}
	var now *hearthv1.Runtime
	if n := slices.IndexFunc(list.Msg.GetRuntimes(), func(o *hearthv1.Runtime) bool { return o.GetName() == rt.Name }); n >= 0 {
		now = list.Msg.GetRuntimes()[n]
	}
	version := fmt.Sprintf("%s/%d", rt.UID, rt.Generation)
	if now != nil && r.applied[rt.Name] == version {
		return now, accepted(), nil
	}
	res, err := r.pool.ApplyRuntime(ctx, connect.NewRequest(&hearthv1.ApplyRuntimeRequest{Runtime: RuntimeMessage(rt)}))
	switch {
	case err != nil && connect.CodeOf(err) == connect.CodeInvalidArgument:
		return now, fault(invalid, said(err)), nil
	case err != nil:
		return nil, verdict{}, fmt.Errorf("apply runtime %s: %w", rt.Name, err)
	}
	r.applied[rt.Name] = version
	return res.Msg.GetRuntime(), accepted(), nil
}

// describe writes a Runtime's status.
func (r *runtimes) describe(rt *crd.Runtime, now *hearthv1.Runtime, accepted verdict) {
	st := &rt.Status
	st.ObservedGeneration, st.Warm, st.Error, st.Image = rt.Generation, now.GetStatus().GetWarm(), cut(now.GetStatus().GetError()), ""
	st.Language = cut(now.GetStatus().GetLanguage())
	if strings.Contains(now.GetImage(), "@sha256:") {
		st.Image = now.GetImage()
	}
	ready := yes("Boots", "nothing is known to keep it from booting")
	switch {
	case accepted.status != metav1.ConditionTrue:
		ready = accepted.unaccepted()
	case st.Error != "":
		ready = fault("BootFailed", st.Error)
	}
	r.judge(rt, &st.Conditions, crd.ConditionAccepted, accepted)
	r.judge(rt, &st.Conditions, crd.ConditionReady, ready)
}
