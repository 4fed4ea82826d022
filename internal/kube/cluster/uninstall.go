package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	"github.com/hearth-serverless/hearth/deploy"
)

const (
	// unregister is the DaemonSet that gives nodes back.
	unregister = "hearth-unregister"
	// gate is in the selector of that DaemonSet while nodeagent is still there, so that it has pods nowhere. It is made before nodeagent
	// goes, and is all that an uninstall that breaks off in between leaves to the next.
	gate = "hearth.dev/unregister-later"
)

// Removal is what Uninstall takes out of a cluster.
type Removal struct {
	// Kinds removes the custom resource definitions too, and with them what there is of those kinds in any namespace.
	Kinds bool
	// Force goes on when a node cannot be given back, which then stays as it is.
	Force bool
	// Within bounds each of the things that are waited for.
	Within time.Duration
}

// Uninstall ends all Functions and pools, gives every node back as it was before Hearth, and removes what Install has made, with both namespaces
// and all that is in them. It may be repeated, and goes on where it was broken off.
func (c *Client) Uninstall(ctx context.Context, r Removal, tell func(string)) error {
	for _, step := range []func(context.Context, Removal, func(string)) error{c.endFunctions, c.endNodeagent, c.giveBack, c.removeAll} {
		if err := step(ctx, r, tell); err != nil {
			return err
		}
	}
	return nil
}

// endFunctions deletes what users have made, and waits until poolmanager has ended all Instances; where it does not, they are deleted.
func (c *Client) endFunctions(ctx context.Context, r Removal, tell func(string)) error {
	for _, kind := range []client.Object{&crd.Function{}, &crd.WarmPool{}, &crd.Runtime{}, &crd.Revision{}} {
		if err := c.api.DeleteAllOf(ctx, kind, client.InNamespace(c.namespace)); err != nil && !apierrors.IsNotFound(err) {
			return c.coded(err)
		}
	}
	instancesLeft := func(ctx context.Context) (string, error) {
		pods, err := c.pods(ctx, "")
		if err != nil || len(pods) == 0 {
			return "", err
		}
		return fmt.Sprintf("waiting for %d instances to end", len(pods)), nil
	}
	err := c.awaitWithin(ctx, r.Within, tell, instancesLeft)
	if connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		return err
	}
	tell("deleting the pods of instances that poolmanager does not end")
	if err := c.api.DeleteAllOf(ctx, &corev1.Pod{}, client.InNamespace(c.namespace), client.HasLabels{crd.LabelInstance}); err != nil {
		return c.coded(err)
	}
	return c.awaitWithin(ctx, r.Within, tell, instancesLeft)
}

func (c *Client) awaitWithin(ctx context.Context, within time.Duration, tell func(string), left func(context.Context) (string, error)) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return c.await(ctx, tell, left)
}

// endNodeagent makes the DaemonSet that will give nodes back, as nodeagent is in this cluster, and has nodeagent go.
func (c *Client) endNodeagent(ctx context.Context, r Removal, tell func(string)) error {
	var agents appsv1.DaemonSet
	err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: nodeagent}, &agents)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return c.coded(err)
	}
	later, err := unregisterAs(&agents)
	if err != nil {
		return err
	}
	if err := c.apply(ctx, later); err != nil {
		return c.coded(fmt.Errorf("apply DaemonSet %s: %w", unregister, err))
	}
	if err := c.api.Delete(ctx, &agents, client.PropagationPolicy(metav1.DeletePropagationForeground)); err != nil && !apierrors.IsNotFound(err) {
		return c.coded(err)
	}
	return c.awaitWithin(ctx, r.Within, tell, func(ctx context.Context) (string, error) {
		daemons, err := c.daemons(ctx)
		daemons = slices.DeleteFunc(daemons, func(d Daemon) bool { return d.Name != nodeagent })
		if err != nil || len(daemons) == 0 {
			return "", err
		}
		return fmt.Sprintf("waiting for nodeagent to end on %d nodes", len(daemons)), nil
	})
}

// unregisterAs is the DaemonSet that undoes what nodeagent's has done: with its images, on its nodes, with the same way to containerd, which
// overlays may have changed. It has a gate.
func unregisterAs(agents *appsv1.DaemonSet) (*appsv1.DaemonSet, error) {
	spec := agents.Spec.Template.Spec
	register := slices.IndexFunc(spec.InitContainers, func(c corev1.Container) bool { return c.Name == "register" })
	holder := slices.IndexFunc(spec.Containers, func(c corev1.Container) bool { return c.Name == "holder" })
	if register < 0 || holder < 0 {
		return nil, fmt.Errorf("the DaemonSet %s/%s is none of Hearth's: it has no container register, or no holder", SystemNamespace, nodeagent)
	}
	list, err := deploy.Unregister(map[string]string{"hearth/nodeagent": spec.InitContainers[register].Image, "hearth/pause": spec.Containers[holder].Image})
	if err != nil {
		return nil, err
	}
	later := &appsv1.DaemonSet{}
	if len(list) != 1 {
		return nil, errors.New("what gives nodes back is not one DaemonSet")
	}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(list[0], later); err != nil {
		return nil, fmt.Errorf("read DaemonSet %s: %w", unregister, err)
	}
	pod := &later.Spec.Template.Spec
	pod.InitContainers[0].Env = spec.InitContainers[register].Env
	pod.InitContainers[0].VolumeMounts = spec.InitContainers[register].VolumeMounts
	pod.Volumes = slices.DeleteFunc(slices.Clone(spec.Volumes), func(v corev1.Volume) bool {
		return !slices.ContainsFunc(pod.InitContainers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name })
	})
	pod.ImagePullSecrets = spec.ImagePullSecrets
	pod.NodeSelector = map[string]string{gate: ""}
	maps.Copy(pod.NodeSelector, spec.NodeSelector)
	return later, nil
}

// giveBack opens the gate and waits until every node is as it was.
func (c *Client) giveBack(ctx context.Context, r Removal, tell func(string)) error {
	var set appsv1.DaemonSet
	err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: unregister}, &set)
	if apierrors.IsNotFound(err) {
		return nil // done before, or nothing was ever there
	}
	if err != nil {
		return c.coded(err)
	}
	if _, closed := set.Spec.Template.Spec.NodeSelector[gate]; closed {
		delete(set.Spec.Template.Spec.NodeSelector, gate)
		if err := c.api.Update(ctx, &set); err != nil {
			return c.coded(fmt.Errorf("start DaemonSet %s: %w", unregister, err))
		}
	}
	err = c.awaitWithin(ctx, r.Within, tell, c.nodesLeft)
	if err != nil && r.Force && connect.CodeOf(err) == connect.CodeDeadlineExceeded {
		tell("going on: " + err.Error())
		err = nil
	}
	if err != nil {
		return err
	}
	if err := c.api.Delete(ctx, &set); err != nil && !apierrors.IsNotFound(err) {
		return c.coded(err)
	}
	return nil
}

func (c *Client) nodesLeft(ctx context.Context) (string, error) {
	var set appsv1.DaemonSet
	if err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: unregister}, &set); err != nil {
		return "", err
	}
	s := set.Status
	if s.ObservedGeneration >= set.Generation && s.UpdatedNumberScheduled >= s.DesiredNumberScheduled && s.NumberReady >= s.DesiredNumberScheduled {
		return "", nil
	}
	return fmt.Sprintf("waiting for nodes to be given back (%d of %d)", s.NumberReady, s.DesiredNumberScheduled) + c.troubles(ctx), nil
}

// removeAll deletes what Install has applied, last first, and waits until it is gone.
func (c *Client) removeAll(ctx context.Context, r Removal, tell func(string)) error {
	objects, err := Installation{}.objects()
	if err != nil {
		return err
	}
	api, err := c.wide(objects)
	if err != nil {
		return err
	}
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool { return !r.Kinds && o.GetKind() == "CustomResourceDefinition" })
	slices.Reverse(objects)
	for _, o := range objects {
		err := api.Delete(ctx, o, client.PropagationPolicy(metav1.DeletePropagationBackground))
		if err != nil && !apierrors.IsNotFound(err) {
			return c.coded(fmt.Errorf("delete %s %s: %w", o.GetKind(), o.GetName(), err))
		}
	}
	return c.awaitWithin(ctx, r.Within, tell, func(ctx context.Context) (string, error) {
		var left []string
		for _, o := range objects {
			if o.GetNamespace() != "" {
				continue // goes with its namespace
			}
			now := &unstructured.Unstructured{}
			now.SetGroupVersionKind(o.GroupVersionKind())
			switch err := api.Get(ctx, client.ObjectKeyFromObject(o), now); {
			case err == nil:
				left = append(left, strings.ToLower(o.GetKind())+" "+o.GetName())
			case !apierrors.IsNotFound(err):
				return "", err
			}
		}
		if len(left) == 0 {
			return "", nil
		}
		return waitingFor(left) + " to go", nil
	})
}

// isHearths says whether a definition is of one of Hearth's kinds.
func isHearths(d *apiextensionsv1.CustomResourceDefinition) bool {
	return d.Spec.Group == crd.GroupVersion.Group
}
