package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/hearth-serverless/hearth/deploy"
)

// lookPause is between two looks at what is waited for.
const lookPause = time.Second

// Installation is what Install brings into a cluster.
type Installation struct {
	// Images of the daemons: references by their names, as deploy.Objects wants them.
	Images map[string]string
	// Registry for functions' code, noted for all users of the cluster; empty leaves what is noted.
	Registry string
	// RestartCommand restarts a node's containerd where systemd does not: `sh -c`, with CONTAINERD_PID in its environment. Empty is systemd.
	RestartCommand string
}

// objects are all of the installation, in the order in which they have to be applied.
func (in Installation) objects() ([]*unstructured.Unstructured, error) {
	list, err := deploy.Objects(in.Images)
	if err != nil {
		return nil, err
	}
	objects := make([]*unstructured.Unstructured, 0, len(list)+1)
	for _, o := range list {
		u := &unstructured.Unstructured{Object: o}
		if err := in.restartBy(u); err != nil {
			return nil, err
		}
		objects = append(objects, u)
	}
	if in.Registry != "" {
		config, err := runtime.DefaultUnstructuredConverter.ToUnstructured(configMap(in.Registry))
		if err != nil {
			return nil, err
		}
		u := &unstructured.Unstructured{Object: config}
		u.SetAPIVersion("v1")
		u.SetKind("ConfigMap")
		unstructured.RemoveNestedField(u.Object, "metadata", "creationTimestamp")
		objects = append(objects, u)
	}
	return objects, nil
}

// restartBy has nodeagent's registration restart containerd by the command.
func (in Installation) restartBy(u *unstructured.Unstructured) error {
	if in.RestartCommand == "" || u.GetKind() != "DaemonSet" {
		return nil
	}
	path := []string{"spec", "template", "spec", "initContainers"}
	containers, _, err := unstructured.NestedSlice(u.Object, path...)
	if err != nil {
		return fmt.Errorf("init containers of %s: %w", u.GetName(), err)
	}
	for _, c := range containers {
		if c, ok := c.(map[string]any); ok && c["name"] == "register" {
			env, _ := c["env"].([]any)
			c["env"] = append(env, map[string]any{"name": "HEARTH_RESTART_COMMAND", "value": in.RestartCommand})
		}
	}
	return unstructured.SetNestedSlice(u.Object, containers, path...)
}

// YAML is the installation as kubectl applies it.
func (in Installation) YAML() ([]byte, error) {
	objects, err := in.objects()
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, o := range objects {
		text, err := yaml.Marshal(o.Object)
		if err != nil {
			return nil, fmt.Errorf("write %s %s: %w", o.GetKind(), o.GetName(), err)
		}
		out.WriteString("---\n")
		out.Write(text)
	}
	return out.Bytes(), nil
}

// Install brings Hearth into the cluster, or makes what is there this version, and returns when all daemons are ready. It may be repeated.
// Whoever calls it needs the rights of the cluster's administrator. Errors: PermissionDenied, DeadlineExceeded (it goes on to become ready).
func (c *Client) Install(ctx context.Context, in Installation, within time.Duration, tell func(string)) error {
	objects, err := in.objects()
	if err != nil {
		return err
	}
	api, err := c.wide(objects)
	if err != nil {
		return err
	}
	for _, o := range objects {
		tell(fmt.Sprintf("applying %s %s", o.GetKind(), o.GetName()))
		if err := api.Apply(ctx, client.ApplyConfigurationFromUnstructured(o), client.ForceOwnership); err != nil {
			return c.coded(fmt.Errorf("apply %s %s: %w", o.GetKind(), o.GetName(), err))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if err := c.await(ctx, tell, c.established); err != nil {
		return err
	}
	return c.await(ctx, tell, c.rolledOut)
}

// wide is a client of objects of any kind: how the API server calls their resources follows from the kinds.
func (c *Client) wide(objects []*unstructured.Unstructured) (client.Client, error) {
	m := mapper(c.api.Scheme())
	for _, o := range objects {
		scope := meta.RESTScopeRoot
		if o.GetNamespace() != "" {
			scope = meta.RESTScopeNamespace
		}
		m.Add(o.GroupVersionKind(), scope)
	}
	return client.New(c.config, client.Options{HTTPClient: c.http, Scheme: c.api.Scheme(), Mapper: m, FieldOwner: fieldManager, Log: logr.Discard()})
}

// await looks again and again until nothing is left to wait for, and tells each time what that is.
func (c *Client) await(ctx context.Context, tell func(string), left func(context.Context) (string, error)) error {
	told := ""
	err := wait.PollUntilContextCancel(ctx, lookPause, true, func(ctx context.Context) (bool, error) {
		text, err := left(ctx)
		if err != nil && ctx.Err() == nil {
			return false, err
		}
		if text != "" && text != told {
			tell(text)
			told = text
		}
		return text == "" && err == nil, nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return connect.NewError(connect.CodeDeadlineExceeded, fmt.Errorf("it takes too long, %s", told))
	}
	return c.coded(err)
}

// established says which kinds the API server does not serve yet.
func (c *Client) established(ctx context.Context) (string, error) {
	var list apiextensionsv1.CustomResourceDefinitionList
	if err := c.api.List(ctx, &list); err != nil {
		return "", err
	}
	var left []string
	for i := range list.Items {
		if d := &list.Items[i]; isHearths(d) && !serves(d, d.Spec.Versions[0].Name) {
			left = append(left, d.Name)
		}
	}
	return waitingFor(left), nil
}

// rolledOut says which daemons are not ready, all of them and of this version.
func (c *Client) rolledOut(ctx context.Context) (string, error) {
	var left []string
	var agents appsv1.DaemonSet
	if err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: nodeagent}, &agents); err != nil {
		return "", err
	}
	if s := agents.Status; s.ObservedGeneration < agents.Generation || s.UpdatedNumberScheduled < s.DesiredNumberScheduled || s.NumberReady < s.DesiredNumberScheduled {
		left = append(left, fmt.Sprintf("nodeagent (%d of %d nodes)", min(s.NumberReady, s.UpdatedNumberScheduled), s.DesiredNumberScheduled))
	}
	for _, name := range []string{poolmanager, gateway} {
		var d appsv1.Deployment
		if err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: name}, &d); err != nil {
			return "", err
		}
		wanted := int32(1)
		if d.Spec.Replicas != nil {
			wanted = *d.Spec.Replicas
		}
		if s := d.Status; s.ObservedGeneration < d.Generation || s.UpdatedReplicas < wanted || s.Replicas > s.UpdatedReplicas || s.AvailableReplicas < wanted {
			left = append(left, fmt.Sprintf("%s (%d of %d)", name, min(s.AvailableReplicas, s.UpdatedReplicas), wanted))
		}
	}
	if len(left) == 0 {
		return "", nil
	}
	return waitingFor(left) + c.troubles(ctx), nil
}

// troubles are why pods of daemons are not ready, in lines of their own, as far as that says more than that they start.
func (c *Client) troubles(ctx context.Context) string {
	daemons, err := c.daemons(ctx)
	if err != nil {
		return ""
	}
	var text strings.Builder
	for _, d := range daemons {
		if d.Ready || strings.HasPrefix(d.Reason, "ContainersNotReady") || strings.HasPrefix(d.Reason, "PodInitializing") || strings.HasPrefix(d.Reason, "ContainerCreating") {
			continue
		}
		fmt.Fprintf(&text, "\n  %s on %s: %s", d.Pod, d.Node, d.Reason)
	}
	return text.String()
}

func waitingFor(left []string) string {
	if len(left) == 0 {
		return ""
	}
	return "waiting for " + strings.Join(left, ", ")
}
