package kube

import (
	"context"

	"connectrpc.com/connect"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// What the controllers ask of the term that leads. pool.Manager is Functions and Runtimes.

// Functions is who runs Functions. Its errors have connect's codes.
type Functions interface {
	// Apply takes over a Function, validated, and leaves one that is as it was.
	Apply(context.Context, *connect.Request[hearthv1.ApplyRequest]) (*connect.Response[hearthv1.ApplyResponse], error)
	// Get is of one, with its status.
	Get(context.Context, *connect.Request[hearthv1.GetRequest]) (*connect.Response[hearthv1.GetResponse], error)
	// Delete goes on when ctx ends while Instances still drain.
	Delete(context.Context, *connect.Request[hearthv1.DeleteRequest]) (*connect.Response[hearthv1.DeleteResponse], error)
	// Functions lists those of the names that it has, or without names all, but for those that are being deleted. Cheap: it is asked
	// every other second.
	Functions(names ...string) []*hearthv1.Function
}

// Runtimes is who boots Runtimes. Its errors have connect's codes.
type Runtimes interface {
	ApplyRuntime(context.Context, *connect.Request[hearthv1.ApplyRuntimeRequest]) (*connect.Response[hearthv1.ApplyRuntimeResponse], error)
	DeleteRuntime(context.Context, *connect.Request[hearthv1.DeleteRuntimeRequest]) (*connect.Response[hearthv1.DeleteRuntimeResponse], error)
	ListRuntimes(context.Context, *connect.Request[hearthv1.ListRuntimesRequest]) (*connect.Response[hearthv1.ListRuntimesResponse], error)
}

// WarmPools is who keeps Instances waiting. None of its methods blocks or fails: what cannot be had is told by PoolStatus.
type WarmPools interface {
	// SetPool takes over a WarmPool, known by its name, and leaves one that is as it was. It is the cache's and must not be changed.
	// Pods that wait have it as their owner.
	SetPool(*crd.WarmPool)
	// DeletePool forgets one; what waits for it alone is discarded.
	DeletePool(name string)
	// PoolStatus says how one stands; false for one that was never set.
	PoolStatus(name string) (PoolStatus, bool)
	// PoolNames lists those that are set.
	PoolNames() []string
}

// PoolStatus is how a WarmPool stands.
type PoolStatus struct {
	// Nodes that it covers; Warm Instances that wait there and Desired ones that should.
	Nodes, Warm, Desired int
	// Error says why there are fewer, and on which node; empty when nothing is known to be wrong.
	Error string
}
