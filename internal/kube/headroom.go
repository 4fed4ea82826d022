package kube

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

const (
	// placeholderLabel names the WarmPool that a placeholder keeps room for.
	placeholderLabel = "hearth.dev/placeholder"
	// PlaceholderPriority is the PriorityClass of placeholders: below all else.
	PlaceholderPriority = "hearth-placeholder"
)

// headroom keeps as many placeholder pods as WarmPools ask for. They have the size of an Instance's pod and the lowest priority, so that
// the scheduler takes their room when an Instance needs it. Their names are numbers: none is ever made twice.
func (p *pods) headroom(ctx context.Context) error {
	var all corev1.PodList
	if err := p.api.List(ctx, &all, client.InNamespace(p.namespace), client.HasLabels{placeholderLabel}, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("list placeholders: %w", err)
	}
	wanted := map[string]*corev1.Pod{}
	for _, w := range p.pools.all() {
		for n := range int(w.Spec.Headroom) {
			pod := p.placeholder(w, n)
			wanted[pod.Name] = pod
		}
	}
	var errs []error
	for i := range all.Items {
		pod := &all.Items[i]
		ended := pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded
		if wanted[pod.Name] != nil && !ended {
			delete(wanted, pod.Name)
			continue
		}
		if pod.DeletionTimestamp == nil {
			errs = append(errs, client.IgnoreNotFound(p.api.Delete(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}})))
		}
		delete(wanted, pod.Name) // when it is gone
	}
	for _, pod := range wanted {
		if err := p.api.Create(ctx, pod); err != nil && !apierrors.IsAlreadyExists(err) {
			errs = append(errs, fmt.Errorf("create placeholder %s: %w", pod.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (p *pods) placeholder(w *crd.WarmPool, n int) *corev1.Pod {
	pod := p.podFor("", w.Name+"-headroom-"+strconv.Itoa(n), "", w)
	delete(pod.Labels, crd.LabelInstance)
	delete(pod.Labels, crd.LabelPool) // it does not wait for anybody
	pod.Labels[nameLabel], pod.Labels[placeholderLabel] = "hearth-placeholder", w.Name
	none := int64(0)
	pod.Spec.TerminationGracePeriodSeconds, pod.Spec.PriorityClassName = &none, PlaceholderPriority
	pod.Spec.Affinity, pod.Spec.NodeSelector = nil, w.Spec.NodeSelector
	pod.Spec.Containers[0].Lifecycle = nil
	return pod
}
