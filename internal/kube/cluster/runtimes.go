package cluster

import (
	"cmp"
	"context"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// ApplyRuntime creates or changes a Runtime. If some of it should be warm, a WarmPool of its name, which it owns, says so; any other WarmPool
// of it is as it was. It waits as ApplyFunction does.
func (c *Client) ApplyRuntime(ctx context.Context, r *hearthv1.Runtime, wait bool, tell func(string)) (*hearthv1.Runtime, error) {
	object := runtimeObject(r)
	object.Namespace = c.namespace
	if err := c.apply(ctx, object); err != nil {
		return nil, c.missing(err, "runtime", r.GetName())
	}
	pool, err := c.applyRuntimePool(ctx, object, r.GetWarm())
	if err != nil {
		return nil, err
	}
	if wait {
		if err := awaitReady(ctx, c, &crd.RuntimeList{}, object, tell); err != nil {
			return nil, err
		}
		if pool != nil {
			if err := awaitReady(ctx, c, &crd.WarmPoolList{}, pool, tell); err != nil {
				return nil, err
			}
		}
	}
	return runtimeMessage(object, r.GetWarm()), nil
}

// applyRuntimePool makes the WarmPool that ApplyRuntime speaks of, or deletes it.
func (c *Client) applyRuntimePool(ctx context.Context, owner *crd.Runtime, warm int32) (*crd.WarmPool, error) {
	pool := &crd.WarmPool{ObjectMeta: metav1.ObjectMeta{Namespace: c.namespace, Name: owner.Name}}
	if warm == 0 {
		err := c.api.Get(ctx, client.ObjectKeyFromObject(pool), pool)
		if err == nil && metav1.IsControlledBy(pool, owner) {
			err = c.api.Delete(ctx, pool)
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return nil, c.coded(err)
		}
		return nil, nil
	}
	pool.Spec = crd.WarmPoolSpec{Runtime: owner.Name, Size: &warm}
	pool.Labels = map[string]string{managedBy: fieldManager}
	pool.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(owner, crd.GroupVersion.WithKind("Runtime"))}
	if err := c.apply(ctx, pool); err != nil {
		return nil, c.missing(err, "pool", pool.Name)
	}
	return pool, nil
}

// Runtimes are those of the namespace, by name; each with how many of it wait on a node that all WarmPools cover.
func (c *Client) Runtimes(ctx context.Context) ([]*hearthv1.Runtime, error) {
	var list crd.RuntimeList
	if err := c.api.List(ctx, &list, client.InNamespace(c.namespace)); err != nil {
		return nil, c.missing(err, "runtime", "")
	}
	pools, err := c.Pools(ctx)
	if err != nil {
		return nil, err
	}
	warm := map[string]int32{}
	for _, p := range pools {
		if p.Spec.Size != nil {
			warm[p.Spec.Runtime] += *p.Spec.Size
		}
	}
	slices.SortFunc(list.Items, func(a, b crd.Runtime) int { return cmp.Compare(a.Name, b.Name) })
	out := make([]*hearthv1.Runtime, 0, len(list.Items))
	for i := range list.Items {
		out = append(out, runtimeMessage(&list.Items[i], warm[list.Items[i].Name]))
	}
	return out, nil
}

// DeleteRuntime deletes a Runtime, and its own WarmPool with it. Errors: NotFound, FailedPrecondition (a Function needs it).
func (c *Client) DeleteRuntime(ctx context.Context, name string) error {
	var functions crd.FunctionList
	if err := c.api.List(ctx, &functions, client.InNamespace(c.namespace)); err != nil {
		return c.missing(err, "function", "")
	}
	for _, f := range functions.Items {
		if f.Spec.Runtime == name {
			return neededBy(f.Name)
		}
	}
	object := &crd.Runtime{ObjectMeta: metav1.ObjectMeta{Namespace: c.namespace, Name: name}}
	return c.missing(c.api.Delete(ctx, object), "runtime", name)
}

// Pools are the WarmPools of the namespace, by name.
func (c *Client) Pools(ctx context.Context) ([]crd.WarmPool, error) {
	var list crd.WarmPoolList
	if err := c.api.List(ctx, &list, client.InNamespace(c.namespace)); err != nil {
		return nil, c.missing(err, "pool", "")
	}
	slices.SortFunc(list.Items, func(a, b crd.WarmPool) int { return cmp.Compare(a.Name, b.Name) })
	return list.Items, nil
}

// ApplyPool creates or changes a WarmPool.
func (c *Client) ApplyPool(ctx context.Context, pool *crd.WarmPool) (*crd.WarmPool, error) {
	object := pool.DeepCopy()
	object.Namespace = c.namespace
	if err := c.apply(ctx, object); err != nil {
		return nil, c.missing(err, "pool", pool.Name)
	}
	return object, nil
}

// DeletePool deletes a WarmPool; what waited of it ends. Errors: NotFound.
func (c *Client) DeletePool(ctx context.Context, name string) error {
	object := &crd.WarmPool{ObjectMeta: metav1.ObjectMeta{Namespace: c.namespace, Name: name}}
	return c.missing(c.api.Delete(ctx, object), "pool", name)
}
