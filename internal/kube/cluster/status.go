package cluster

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// What the daemons' manifests and their leader's election go by.
const (
	leaseName       = "hearth-poolmanager"
	epochAnnotation = "hearth.dev/epoch"
)

// Status is what the daemons of a cluster are like.
type Status struct {
	Context   string   `json:"context"`
	Server    string   `json:"server"`
	Namespace string   `json:"namespace"`
	Leader    string   `json:"leader,omitempty"` // who holds the Lease: the pod's name, and what tells its restarts apart
	Epoch     int64    `json:"epoch,omitempty"`
	Daemons   []Daemon `json:"daemons"`
	Nodes     []Node   `json:"nodes"`
}

// Daemon is one pod in the system namespace.
type Daemon struct {
	Name     string    `json:"name"` // nodeagent, poolmanager or gateway
	Pod      string    `json:"pod"`
	Node     string    `json:"node"`
	Version  string    `json:"version"` // of its image
	Ready    bool      `json:"ready"`
	Leader   bool      `json:"leader,omitempty"`
	Restarts int       `json:"restarts"`
	Created  time.Time `json:"created"`
	Reason   string    `json:"reason,omitempty"`
}

// Node is a node of the cluster.
type Node struct {
	Name        string `json:"name"`
	Ready       bool   `json:"ready"`
	Schedulable bool   `json:"schedulable"`
	// Nodeagent is ready on it.
	Nodeagent bool `json:"nodeagent"`
}

// Status looks at the daemons, the leader's Lease and the nodes. The error is Unavailable if Hearth is not in the cluster.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	s := &Status{Context: c.context, Server: c.config.Host, Namespace: c.namespace}
	var err error
	if s.Daemons, err = c.daemons(ctx); err != nil {
		return nil, err
	}
	if len(s.Daemons) == 0 {
		return s, c.notInstalled()
	}
	if s.Leader, s.Epoch, err = c.leader(ctx); err != nil {
		return nil, err
	}
	for i := range s.Daemons {
		s.Daemons[i].Leader = s.Daemons[i].Name == poolmanager && s.Leader != "" && strings.HasPrefix(s.Leader, s.Daemons[i].Pod)
	}
	s.Nodes, err = c.nodes(ctx, s.Daemons)
	return s, err
}

func (c *Client) daemons(ctx context.Context) ([]Daemon, error) {
	var pods corev1.PodList
	if err := c.api.List(ctx, &pods, client.InNamespace(SystemNamespace), client.MatchingLabels{nameLabel: daemonsName}); err != nil {
		return nil, c.coded(err)
	}
	out := make([]Daemon, 0, len(pods.Items))
	for i := range pods.Items {
		out = append(out, daemonOf(&pods.Items[i]))
	}
	slices.SortFunc(out, func(a, b Daemon) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Pod, b.Pod))
	})
	return out, nil
}

func daemonOf(p *corev1.Pod) Daemon {
	d := Daemon{
		Name: p.Labels[componentLabel], Pod: p.Name, Node: p.Spec.NodeName, Ready: isReady(p), Created: p.CreationTimestamp.Time,
	}
	for _, container := range p.Spec.Containers {
		if d.Version == "" || strings.HasSuffix(container.Name, d.Name) {
			d.Version = version(container.Image)
		}
	}
	for _, s := range p.Status.ContainerStatuses {
		d.Restarts += int(s.RestartCount)
	}
	if !d.Ready {
		d.Reason = whyPending(p)
	}
	return d
}

// version is an image's tag, or the beginning of its digest.
func version(image string) string {
	name, digest, byDigest := strings.Cut(image, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		return name[i+1:]
	}
	if byDigest {
		_, hex, _ := strings.Cut(digest, ":")
		return hex[:min(12, len(hex))]
	}
	return "latest"
}

// whyPending says why a pod is not ready, as far as it tells.
func whyPending(p *corev1.Pod) string {
	if p.DeletionTimestamp != nil {
		return "is ending"
	}
	for _, s := range append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...) {
		if t := s.LastTerminationState.Terminated; t != nil && t.Message != "" && s.State.Running == nil {
			return joined(t.Reason+" "+strconv.Itoa(int(t.ExitCode)), t.Message)
		}
		if w := s.State.Waiting; w != nil && w.Reason != "" {
			return joined(w.Reason, w.Message)
		}
		if t := s.State.Terminated; t != nil && t.ExitCode != 0 {
			return joined(t.Reason+" "+strconv.Itoa(int(t.ExitCode)), t.Message)
		}
	}
	for _, condition := range p.Status.Conditions {
		if condition.Status == corev1.ConditionFalse && condition.Message != "" {
			return joined(condition.Reason, condition.Message)
		}
	}
	return string(p.Status.Phase)
}

func joined(reason, message string) string { return strings.TrimSuffix(reason+": "+message, ": ") }

// leader is the pod that holds the Lease, and its epoch.
func (c *Client) leader(ctx context.Context) (pod string, epoch int64, err error) {
	var lease coordinationv1.Lease
	err = c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: leaseName}, &lease)
	if apierrors.IsNotFound(err) {
		return "", 0, nil
	}
	if err != nil {
		return "", 0, c.coded(err)
	}
	epoch, _ = strconv.ParseInt(lease.Annotations[epochAnnotation], 10, 64) // what is no number is no epoch
	if spec := lease.Spec; spec.HolderIdentity != nil && !c.expired(&lease) {
		pod = *spec.HolderIdentity
	}
	return pod, epoch, nil
}

func (c *Client) expired(lease *coordinationv1.Lease) bool {
	s := lease.Spec
	return s.RenewTime != nil && s.LeaseDurationSeconds != nil && c.now().Sub(s.RenewTime.Time) > time.Duration(*s.LeaseDurationSeconds)*time.Second+clockSkew
}

// clockSkew is how far this machine's clock may be from a leader's before its Lease is taken for an expired one.
const clockSkew = 10 * time.Second

// nodes are those of the cluster. A user who may not see them gets those that daemons are on.
func (c *Client) nodes(ctx context.Context, daemons []Daemon) ([]Node, error) {
	agents := map[string]bool{}
	for _, d := range daemons {
		if d.Name == nodeagent {
			agents[d.Node] = agents[d.Node] || d.Ready
		}
	}
	var list corev1.NodeList
	if err := c.api.List(ctx, &list); err != nil && !apierrors.IsForbidden(err) {
		return nil, c.coded(err)
	}
	out := make([]Node, 0, len(list.Items))
	for _, n := range list.Items {
		ready := slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		})
		out = append(out, Node{Name: n.Name, Ready: ready, Schedulable: !n.Spec.Unschedulable, Nodeagent: agents[n.Name]})
	}
	slices.SortFunc(out, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}
