package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"reflect"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/pool"
)

const (
	// NodeagentComponent is what nodeagent's pods are labelled with as app.kubernetes.io/component.
	NodeagentComponent = "nodeagent"
	// DefaultNodePort is where nodeagent serves, on the host's network.
	DefaultNodePort = 7443
	componentLabel  = "app.kubernetes.io/component"
	nameLabel       = "app.kubernetes.io/name"
)

// nodeSet is the pool.Manager whose nodes follow the cluster's.
type nodeSet interface {
	AddNode(name string, client pool.Node, info pool.NodeInfo) error
	UpdateNode(name string, info pool.NodeInfo)
	RemoveNode(name string)
}

// nodes brings the Manager's nodes in step with the cluster's: those that are there and have, or once had, a nodeagent that was ready. One
// whose nodeagent is being replaced stays, with all its Instances; what its own stream says decides about traffic.
type nodes struct {
	api       client.Reader // of a cache
	manager   nodeSet
	pools     *Pools
	pods      *pods
	namespace string // of nodeagent's pods
	port      int
	dial      func(address string) *http.Client
	log       *slog.Logger

	known map[string]knownNode // by name; of reconcile alone
}

// knownNode is what the Manager was told.
type knownNode struct {
	address string
	info    pool.NodeInfo
	site    site
}

// reconcile takes in what the cluster is now.
func (n *nodes) reconcile(ctx context.Context) error {
	var all corev1.NodeList
	if err := n.api.List(ctx, &all, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	var agents corev1.PodList
	err := n.api.List(ctx, &agents, client.InNamespace(n.namespace), client.MatchingLabels{componentLabel: NodeagentComponent}, client.UnsafeDisableDeepCopy)
	if err != nil {
		return fmt.Errorf("list pods of nodeagent: %w", err)
	}
	serving := map[string]string{}
	for i := range agents.Items {
		if p := &agents.Items[i]; p.Spec.NodeName != "" && isReady(p) && net.ParseIP(p.Status.HostIP) != nil {
			serving[p.Spec.NodeName] = net.JoinHostPort(p.Status.HostIP, strconv.Itoa(n.port))
		}
	}
	gone := maps.Clone(n.known)
	var errs []error
	for i := range all.Items {
		node := &all.Items[i]
		delete(gone, node.Name)
		n.bring(node, serving[node.Name])
		taken, err := untaint(ctx, n.pods.api, node, serving[node.Name] != "" && n.pods.manager.NodeUp(node.Name))
		if taken {
			n.log.Info("node is open for pods", "node", node.Name, "taint", TaintNotReady)
		}
		errs = append(errs, err)
	}
	for name := range gone {
		n.remove(name)
	}
	return errors.Join(errs...)
}

// bring takes in one node; address is empty if no nodeagent is ready there.
func (n *nodes) bring(node *corev1.Node, address string) {
	info, at := infoOf(node), siteOf(node)
	was, known := n.known[node.Name]
	switch {
	case known && (address == "" || address == was.address):
		now := knownNode{was.address, info, at}
		if !reflect.DeepEqual(was, now) {
			n.known[node.Name] = now
			n.pools.setNode(node.Name, at)
			n.manager.UpdateNode(node.Name, info)
		}
		return
	case address == "":
		return
	case known:
		n.remove(node.Name)
	}
	n.pools.setNode(node.Name, at)
	agent := pool.Connect(hearthv1connect.NewNodeServiceClient(n.dial(address), "http://"+address))
	if err := n.manager.AddNode(node.Name, n.pods.on(node.Name, agent), info); err != nil {
		n.log.Error("take in a node", "node", node.Name, "err", err)
		return
	}
	n.log.Info("node found", "node", node.Name, "address", address)
	n.known[node.Name] = knownNode{address, info, at}
}

func (n *nodes) remove(name string) {
	delete(n.known, name)
	n.manager.RemoveNode(name)
	n.pools.removeNode(name)
}

func isReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// infoOf is what the Manager is to know of a node. One that Kubernetes holds for dead is not cordoned: after an outage of the API server
// all of them are for a moment, and what is warm there is not to be given up for that.
func infoOf(node *corev1.Node) pool.NodeInfo {
	info := pool.NodeInfo{Labels: node.Labels, Cordoned: node.Spec.Unschedulable}
	for _, t := range node.Spec.Taints {
		switch t.Key {
		case corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable:
			info.Unready = true
		case corev1.TaintNodeOutOfService:
			info.Cordoned = true
		}
	}
	return info
}

// siteOf leaves out the taints that say how a node is, not what for.
func siteOf(node *corev1.Node) site {
	s := site{labels: node.Labels}
	for _, t := range node.Spec.Taints {
		if !strings.HasPrefix(t.Key, "node.kubernetes.io/") && !strings.HasPrefix(t.Key, "hearth.dev/") {
			s.taints = append(s.taints, t)
		}
	}
	return s
}
