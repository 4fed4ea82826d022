package kube

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync/atomic"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/pki"
	"github.com/hearth-serverless/hearth/pool"
	"github.com/hearth-serverless/hearth/scaler"
)

// maxRequestBytes bounds one request: a report of a gateway with some ten thousand instances.
const maxRequestBytes = 8 << 20

// Gate answers what is asked of a poolmanager: through the handler that was opened last, and Unavailable before, so that who asks asks another.
// The zero value is closed. Safe for concurrent use.
type Gate struct{ handler atomic.Pointer[http.Handler] }

// Open has h answer from now on.
func (g *Gate) Open(h http.Handler) { g.handler.Store(&h) }

// ServeHTTP implements http.Handler.
func (g *Gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h := g.handler.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	err := connect.NewError(connect.CodeUnavailable, errors.New("this poolmanager is a standby; ask the one that leads"))
	_ = connect.NewErrorWriter().Write(w, r, err) // who asked is gone
}

// Services are what gateways and people ask.
type Services interface {
	hearthv1connect.AllocationServiceHandler
	hearthv1connect.FunctionServiceHandler
	hearthv1connect.RuntimeServiceHandler
}

// Lead scales, and lets callers in, until ctx is done.
func (g *Gate) Lead(ctx context.Context, c scaler.Config, s Services) error {
	loop, err := scaler.New(c)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	// Not compressed, as it would be for every client that could read it: most of it crosses no network.
	bound := connect.WithHandlerOptions(connect.WithReadMaxBytes(maxRequestBytes), connect.WithCompression("gzip", nil, nil))
	mux.Handle(hearthv1connect.NewAllocationServiceHandler(s, bound))
	mux.Handle(hearthv1connect.NewFunctionServiceHandler(s, bound))
	mux.Handle(hearthv1connect.NewRuntimeServiceHandler(s, bound))
	mux.Handle(hearthv1connect.NewLoadServiceHandler(loop, bound))
	g.Open(mux)
	return loop.Run(ctx)
}

// Serve answers on a Unix socket and on the network, until ctx is done.
func (g *Gate) Serve(ctx context.Context, log *slog.Logger, socket string, network daemon.Network) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return daemon.ServeUnix(ctx, socket, g) })
	group.Go(func() error { return network.Serve(ctx, log, g, pki.Gateway, pki.Admin) })
	return group.Wait()
}

// Resources is a Manager whose Functions and Runtimes are the cluster's objects: who asks for a change over RPC is told what to do.
type Resources struct{ *pool.Manager }

func elsewhere(what string) error {
	return connect.NewError(connect.CodeFailedPrecondition, errors.New("on Kubernetes "+what))
}

// Apply implements FunctionService.
func (Resources) Apply(context.Context, *connect.Request[hearthv1.ApplyRequest]) (*connect.Response[hearthv1.ApplyResponse], error) {
	return nil, elsewhere("a function is changed by its resource: apply a Function of hearth.dev/v1alpha1, with kubectl or `hearth deploy`")
}

// Delete implements FunctionService.
func (Resources) Delete(context.Context, *connect.Request[hearthv1.DeleteRequest]) (*connect.Response[hearthv1.DeleteResponse], error) {
	return nil, elsewhere("a function is deleted by its resource: `kubectl delete function.hearth.dev NAME`")
}

// ApplyRuntime implements RuntimeService.
func (Resources) ApplyRuntime(context.Context, *connect.Request[hearthv1.ApplyRuntimeRequest]) (*connect.Response[hearthv1.ApplyRuntimeResponse], error) {
	return nil, elsewhere("a runtime is changed by its resource: apply a Runtime of hearth.dev/v1alpha1")
}

// DeleteRuntime implements RuntimeService.
func (Resources) DeleteRuntime(context.Context, *connect.Request[hearthv1.DeleteRuntimeRequest]) (*connect.Response[hearthv1.DeleteRuntimeResponse], error) {
	return nil, elsewhere("a runtime is deleted by its resource: `kubectl delete runtime.hearth.dev NAME`")
}
