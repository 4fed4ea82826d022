package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"connectrpc.com/connect"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// functions keeps the pool's Functions as the custom resources say.
type functions struct {
	objects
	pool Functions
	url  func(string) string

	mu sync.Mutex // guards applied
	// applied is what the pool was given of each in this term: a status alone asks neither the pool nor for Secrets.
	applied map[types.NamespacedName]string
}

// functionState is what a status says; the scaler's sentence is not in it, for it may change all the time while nothing else does.
type functionState struct {
	revision                 string
	ready, starting, desired int32
	err                      string
}

func (c Controllers) addFunctions(m manager.Manager, r *functions) error {
	look := func(context.Context) (map[string]functionState, error) {
		states := map[string]functionState{}
		for _, f := range c.Functions.Functions() {
			s := f.GetStatus()
			states[f.GetName()] = functionState{s.GetRevision(), s.GetReady(), s.GetStarting(), s.GetDesired(), s.GetError()}
		}
		return states, nil
	}
	return control(m, c.Namespace, &crd.Function{}, 8, r, look, func(b *builder.Builder) *builder.Builder {
		// Their values are read when they are needed, and not kept in memory here.
		return b.WatchesMetadata(&corev1.Secret{}, handler.EnqueueRequestsFromMapFunc(r.usersOf))
	})
}

// secretsOf lists the Secrets that a Function names.
func secretsOf(f *crd.Function) []string {
	var names []string
	for _, s := range f.Spec.Secrets {
		names = append(names, s.SecretKeyRef.Name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// usersOf lists the Functions that a Secret is in. What the pool keeps for itself is in none.
func (r *functions) usersOf(ctx context.Context, secret client.Object) []reconcile.Request {
	var list crd.FunctionList
	if owner := metav1.GetControllerOf(secret); owner != nil && owner.Kind == "Revision" ||
		r.List(ctx, &list, client.InNamespace(secret.GetNamespace()), client.UnsafeDisableDeepCopy) != nil { // the cache has stopped
		return nil
	}
	var requests []reconcile.Request
	for n := range list.Items {
		if f := &list.Items[n]; slices.Contains(secretsOf(f), secret.GetName()) {
			requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(f)})
		}
	}
	return requests
}

// Reconcile takes over one Function, and writes what became of it.
func (r *functions) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var f crd.Function
	there, err := r.get(ctx, req.NamespacedName, &f)
	if err != nil {
		return reconcile.Result{}, err
	}
	if !there {
		return reconcile.Result{}, r.remove(ctx, req.NamespacedName)
	}
	said, accepted, err := r.apply(ctx, &f)
	if err != nil {
		return reconcile.Result{}, err
	}
	before := f.DeepCopy()
	r.describe(&f, said.GetStatus(), accepted)
	result := reconcile.Result{}
	if accepted.reason == runtimeNotFound {
		result.RequeueAfter = tryAgain
	}
	return result, r.writeStatus(ctx, before, &f)
}

// Reasons of a Function's conditions.
const (
	invalid         = "Invalid"
	secretNotFound  = "SecretNotFound"
	runtimeNotFound = "RuntimeNotFound"
)

// remove has the pool forget a Function. What is left of it drains there.
func (r *functions) remove(ctx context.Context, key types.NamespacedName) error {
	r.mu.Lock()
	delete(r.applied, key)
	r.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	_, err := r.pool.Delete(ctx, connect.NewRequest(&hearthv1.DeleteRequest{Name: key.Name}))
	if err == nil || goesOn(err) || connect.CodeOf(err) == connect.CodeNotFound {
		return nil
	}
	return fmt.Errorf("delete function %s: %w", key.Name, err)
}

// apply has the pool take over a Function, unless it has it as it is, and returns what the pool says of it: nothing if it never
// accepted it. An error is one that may pass by itself.
func (r *functions) apply(ctx context.Context, f *crd.Function) (*hearthv1.Function, verdict, error) {
	key := client.ObjectKeyFromObject(f)
	version, err := r.version(ctx, f)
	if err != nil {
		return nil, verdict{}, err
	}
	known, err := r.pool.Get(ctx, connect.NewRequest(&hearthv1.GetRequest{Name: f.Name}))
	if err != nil && connect.CodeOf(err) != connect.CodeNotFound {
		return nil, verdict{}, fmt.Errorf("get function %s: %w", f.Name, err)
	}
	r.mu.Lock()
	same := err == nil && r.applied[key] == version
	r.mu.Unlock()
	if same {
		return known.Msg.GetFunction(), accepted(), nil
	}
	var now *hearthv1.Function
	if known != nil {
		now = known.Msg.GetFunction()
	}
	secrets, missing, err := r.secrets(ctx, f)
	if err != nil || missing != "" {
		return now, fault(secretNotFound, missing), err
	}
	ask, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	res, err := r.pool.Apply(ask, connect.NewRequest(&hearthv1.ApplyRequest{Function: &hearthv1.Function{Name: f.Name, Spec: FunctionSpec(&f.Spec, secrets)}}))
	switch connect.CodeOf(err) {
	case connect.CodeInvalidArgument:
		return now, fault(invalid, said(err)), nil
	case connect.CodeFailedPrecondition:
		return now, fault(runtimeNotFound, said(err)), nil
	}
	if err != nil {
		return nil, verdict{}, fmt.Errorf("apply function %s: %w", f.Name, err)
	}
	r.mu.Lock()
	r.applied[key] = version
	r.mu.Unlock()
	return res.Msg.GetFunction(), accepted(), nil
}

// version names all that a Function's spec is made of: another one is another spec.
func (r *functions) version(ctx context.Context, f *crd.Function) (string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "%s/%d", f.UID, f.Generation)
	for _, name := range secretsOf(f) {
		var secret metav1.PartialObjectMetadata
		secret.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Secret"))
		if err := r.Get(ctx, types.NamespacedName{Namespace: f.Namespace, Name: name}, &secret); client.IgnoreNotFound(err) != nil {
			return "", fmt.Errorf("get secret %s: %w", name, err)
		}
		fmt.Fprintf(&b, " %s/%s", secret.UID, secret.ResourceVersion)
	}
	return b.String(), nil
}

// secrets reads the values that a Function's files have, or says which is missing.
func (r *functions) secrets(ctx context.Context, f *crd.Function) (values map[string][]byte, missing string, err error) {
	read := map[string]*corev1.Secret{}
	for _, name := range secretsOf(f) {
		var secret corev1.Secret
		switch err := r.live.Get(ctx, types.NamespacedName{Namespace: f.Namespace, Name: name}, &secret); {
		case apierrors.IsNotFound(err):
			return nil, fmt.Sprintf("spec.secrets: there is no Secret %q in namespace %s; make it with `kubectl create secret generic`", name, f.Namespace), nil
		case err != nil:
			return nil, "", fmt.Errorf("get secret %s: %w", name, err)
		}
		read[name] = &secret
	}
	values = map[string][]byte{}
	for _, s := range f.Spec.Secrets {
		value := read[s.SecretKeyRef.Name].Data[s.SecretKeyRef.Key]
		if len(value) == 0 { // to the pool that means: as before
			return nil, fmt.Sprintf("spec.secrets: Secret %q has no key %q, or nothing in it", s.SecretKeyRef.Name, s.SecretKeyRef.Key), nil
		}
		values[s.Name] = value
	}
	return values, "", nil
}

// describe writes a Function's status.
func (r *functions) describe(f *crd.Function, s *hearthv1.FunctionStatus, accepted verdict) {
	st := &f.Status
	if moved := st.Ready != s.GetReady() || st.Starting != s.GetStarting() || st.Desired != s.GetDesired(); moved || st.ObservedGeneration != f.Generation {
		st.Reason = cut(s.GetReason())
	}
	st.Ready, st.Starting, st.Desired = s.GetReady(), s.GetStarting(), s.GetDesired()
	st.ObservedGeneration, st.LatestRevision, st.URL = f.Generation, s.GetRevision(), r.url(f.Name)
	ready := yes("ScaledToZero", "no instance serves, and the next request starts one")
	switch {
	case accepted.status != metav1.ConditionTrue:
		ready = accepted.unaccepted()
	case s.GetReady() > 0:
		ready = yes("Serving", "instances serve")
	case s.GetError() != "":
		ready = fault("StartFailed", s.GetError())
	case f.Spec.Scaling.Min > 0:
		ready = notYet("Starting", "the instances of spec.scaling.min are being started")
	}
	r.judge(f, &st.Conditions, crd.ConditionAccepted, accepted)
	r.judge(f, &st.Conditions, crd.ConditionReady, ready)
}
