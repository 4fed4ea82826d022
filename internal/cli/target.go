package cli

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/doctor"
	"github.com/hearth-serverless/hearth/internal/kube/cluster"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// deployment is what the commands talk to: a single machine by its sockets, or a cluster by its API server. Errors are of connect's codes
// (NotFound, Unavailable, …), whichever it is, so that exit codes and advice do not depend on it. TestDeployments is the suite that
// both pass. It has more than four methods because it is all of hearth's commands over one deployment; its parts are small.
type deployment interface {
	functionStore
	runtimeStore
	poolStore
	observer
	surroundings
}

type functionStore interface {
	// ApplyFunction creates or changes a Function. With wait it returns when what it runs is on the nodes, and tells meanwhile what it
	// waits for.
	ApplyFunction(ctx context.Context, f *hearthv1.Function, wait bool, tell func(string)) (*hearthv1.Function, error)
	Functions(context.Context) ([]*hearthv1.Function, error)
	// DeleteFunction returns when its Instances have ended.
	DeleteFunction(ctx context.Context, name string) error
}

type runtimeStore interface {
	// ApplyRuntime is like ApplyFunction.
	ApplyRuntime(ctx context.Context, r *hearthv1.Runtime, wait bool, tell func(string)) (*hearthv1.Runtime, error)
	Runtimes(context.Context) ([]*hearthv1.Runtime, error)
	DeleteRuntime(ctx context.Context, name string) error
	// Imports says what Functions import that their Runtime, one or each, has not preloaded.
	Imports(ctx context.Context, runtime string) (*hearthv1.ListImportsResponse, error)
}

type poolStore interface {
	// Pools are of what is kept warm, with how much of it there is.
	Pools(context.Context) ([]crd.WarmPool, error)
	ApplyPool(context.Context, *crd.WarmPool) (*crd.WarmPool, error)
	DeletePool(ctx context.Context, name string) error
}

type observer interface {
	// Instances are a Function's, or all.
	Instances(ctx context.Context, function string) ([]*hearthv1.Instance, error)
	// Logs gives each line that a Function's Instances have written, and ends when there is no more of it.
	Logs(ctx context.Context, req *hearthv1.LogsRequest, line func(*hearthv1.LogsResponse) error) error
	// Diagnose says what keeps the deployment from working.
	Diagnose(context.Context) ([]doctor.Finding, error)
}

type surroundings interface {
	// Registry is where code is pushed to: HOST[:PORT][/PATH].
	Registry(context.Context) (string, error)
	// GatewayURL is where callers find the gateway.
	GatewayURL(context.Context) (string, error)
	// Gateway is a way to it from here. It has to be closed.
	Gateway(context.Context) (*gateway, error)
}

// gateway is a way to send requests to the gateway.
type gateway struct {
	url       string
	transport http.RoundTripper // nil for the usual one
	close     func()
}

// completionTime bounds what completion asks a deployment for: a user waits at the prompt.
const completionTime = 2 * time.Second

// clusterFlags choose a cluster; --run chooses a single machine.
var clusterFlags = []string{"kubeconfig", "context", "namespace"}

// onMachine is the annotation of commands that are of a single machine alone.
const onMachine = "hearth.dev/on-machine"

// remember notes which flags were on the command line, before others are set from the environment: they win over those.
func (a *app) remember() {
	a.said = map[string]bool{}
	for _, name := range append([]string{"run"}, clusterFlags...) {
		a.said[name] = a.flags.Changed(name)
	}
}

// wants says which deployment flags name, those on the command line or, if none is there, those of the environment.
func (a *app) wants() (machine, onCluster bool, err error) {
	said := func(name string) bool { return a.said[name] }
	machine, onCluster = said("run"), slices.ContainsFunc(clusterFlags, said)
	if !machine && !onCluster {
		machine, onCluster = a.flags.Changed("run"), slices.ContainsFunc(clusterFlags, a.flags.Changed)
	}
	if machine && onCluster {
		return false, false, usagef("--run names a single machine, and --kubeconfig, --context and --namespace a cluster: use one or the other")
	}
	return machine, onCluster, nil
}

// deployment is what this call of hearth talks to. Nothing is connected to before it is asked for.
func (a *app) deployment() (deployment, error) {
	onCluster, err := a.onCluster()
	if err != nil {
		return nil, err
	}
	if !onCluster {
		return a.machine(), nil
	}
	c, err := a.cluster()
	if err != nil {
		return nil, err
	}
	return clusterDeployment{c}, nil
}

// onCluster says which kind of deployment is meant: as flags say; or the single machine, if one is up in the usual folder; or the
// cluster of the kubeconfig, if there is one. The plugin of kubectl means a cluster.
func (a *app) onCluster() (bool, error) {
	machine, onCluster, err := a.wants()
	switch {
	case err != nil || machine || onCluster:
		return onCluster, err
	case a.isPlugin():
		return true, nil
	}
	if _, err := stack.ReadStatus(a.run); err == nil {
		return false, nil
	}
	return cluster.Configured(a.kube), nil
}

// cluster is the cluster's client, one for this call of hearth.
func (a *app) cluster() (*cluster.Client, error) {
	if a.client == nil {
		c, err := cluster.Open(a.kube)
		if rpc := (*connect.Error)(nil); errors.As(err, &rpc) {
			return nil, &spoken{text: rpc.Message(), err: err} // it says what to do, and needs no code before it
		}
		if err != nil {
			return nil, err
		}
		a.client = c
	}
	return a.client, nil
}
