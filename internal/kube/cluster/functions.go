package cluster

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	endTime  = 2 * time.Minute        // that the Instances of a deleted Function may take to end
	endPause = 500 * time.Millisecond // between two looks whether they have
)

// ApplyFunction creates or changes a Function, with a Secret of its own for its secrets. With wait it returns when the Function is Ready, and
// tells meanwhile what it waits for. Errors: InvalidArgument, NotFound (Hearth is not in the cluster), DeadlineExceeded.
func (c *Client) ApplyFunction(ctx context.Context, f *hearthv1.Function, wait bool, tell func(string)) (*hearthv1.Function, error) {
	object := functionObject(f)
	object.Namespace = c.namespace
	secret, err := c.applySecret(ctx, f)
	if err != nil {
		return nil, err
	}
	if err := c.apply(ctx, object); err != nil {
		return nil, c.missing(err, "function", f.GetName())
	}
	if secret != nil {
		if err := c.own(ctx, secret, object); err != nil {
			return nil, err
		}
	}
	if wait {
		if err := awaitReady(ctx, c, &crd.FunctionList{}, object, tell); err != nil {
			return nil, err
		}
	}
	return functionMessage(object), nil
}

// applySecret keeps the values of a Function's secrets, if it has any, in a Secret. An empty value stays what it is.
func (c *Client) applySecret(ctx context.Context, f *hearthv1.Function) (*corev1.Secret, error) {
	values := f.GetSpec().GetSecrets()
	if len(values) == 0 {
		return nil, nil
	}
	var old corev1.Secret
	err := c.api.Get(ctx, client.ObjectKey{Namespace: c.namespace, Name: secretName(f.GetName())}, &old)
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, c.coded(err)
	}
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: c.namespace, Name: secretName(f.GetName()), Labels: map[string]string{managedBy: fieldManager}, OwnerReferences: old.OwnerReferences},
		Data:       map[string][]byte{},
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		value := values[name]
		if len(value) == 0 {
			value = old.Data[name]
		}
		secret.Data[name] = value
	}
	if err := c.apply(ctx, secret); err != nil {
		return nil, c.missing(err, "secret", secret.Name)
	}
	return secret, nil
}

// own has an object end with another.
func (c *Client) own(ctx context.Context, object client.Object, owner client.Object) error {
	gvk := owner.GetObjectKind().GroupVersionKind()
	reference := metav1.OwnerReference{APIVersion: gvk.GroupVersion().String(), Kind: gvk.Kind, Name: owner.GetName(), UID: owner.GetUID()}
	if slices.Contains(object.GetOwnerReferences(), reference) {
		return nil
	}
	object.SetOwnerReferences([]metav1.OwnerReference{reference})
	object.SetManagedFields(nil)
	object.SetResourceVersion("")
	return c.coded(c.apply(ctx, object))
}

// Functions are those of the namespace, by name.
func (c *Client) Functions(ctx context.Context) ([]*hearthv1.Function, error) {
	var list crd.FunctionList
	if err := c.api.List(ctx, &list, client.InNamespace(c.namespace)); err != nil {
		return nil, c.missing(err, "function", "")
	}
	slices.SortFunc(list.Items, func(a, b crd.Function) int { return cmp.Compare(a.Name, b.Name) })
	out := make([]*hearthv1.Function, 0, len(list.Items))
	for i := range list.Items {
		out = append(out, functionMessage(&list.Items[i]))
	}
	return out, nil
}

// DeleteFunction deletes a Function and returns when its Instances have ended. Errors: NotFound, DeadlineExceeded (it is deleted, and they
// still end).
func (c *Client) DeleteFunction(ctx context.Context, name string) error {
	object := &crd.Function{ObjectMeta: metav1.ObjectMeta{Namespace: c.namespace, Name: name}}
	if err := c.api.Delete(ctx, object); err != nil {
		return c.missing(err, "function", name)
	}
	left := 0
	err := wait.PollUntilContextTimeout(ctx, endPause, endTime, true, func(ctx context.Context) (bool, error) {
		pods, err := c.pods(ctx, name)
		left = len(pods)
		return left == 0, err
	})
	if wait.Interrupted(err) && ctx.Err() == nil {
		return connect.NewError(connect.CodeDeadlineExceeded, fmt.Errorf("it is deleted, and %d of its instances have not ended after %s", left, endTime))
	}
	return c.coded(err)
}
