package pool_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/pool"
)

// server is a fakeNode as NodeService.
type server struct {
	hearthv1connect.UnimplementedNodeServiceHandler
	n *fakeNode
}

func respond[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m), nil
}

func (s server) CreateInstance(ctx context.Context, r *connect.Request[hearthv1.CreateInstanceRequest]) (*connect.Response[hearthv1.CreateInstanceResponse], error) {
	i, err := s.n.CreateInstance(ctx, r.Msg)
	return respond(&hearthv1.CreateInstanceResponse{Instance: i}, err)
}

func (s server) Activate(ctx context.Context, r *connect.Request[hearthv1.ActivateRequest]) (*connect.Response[hearthv1.ActivateResponse], error) {
	m, err := s.n.Activate(ctx, r.Msg)
	return respond(m, err)
}

func (s server) Freeze(ctx context.Context, r *connect.Request[hearthv1.FreezeRequest]) (*connect.Response[hearthv1.FreezeResponse], error) {
	i, err := s.n.Freeze(ctx, r.Msg)
	return respond(&hearthv1.FreezeResponse{Instance: i}, err)
}

func (s server) Discard(ctx context.Context, r *connect.Request[hearthv1.DiscardRequest]) (*connect.Response[hearthv1.DiscardResponse], error) {
	return respond(&hearthv1.DiscardResponse{}, s.n.Discard(ctx, r.Msg))
}

func (s server) WatchInstances(ctx context.Context, r *connect.Request[hearthv1.WatchInstancesRequest], out *connect.ServerStream[hearthv1.WatchInstancesResponse]) error {
	return s.n.Watch(ctx, r.Msg.GetEpoch(), out.Send)
}

func (s server) PrepareRevision(ctx context.Context, r *connect.Request[hearthv1.PrepareRevisionRequest]) (*connect.Response[hearthv1.PrepareRevisionResponse], error) {
	m, err := s.n.PrepareRevision(ctx, r.Msg)
	return respond(m, err)
}

func (s server) ForgetRevision(ctx context.Context, r *connect.Request[hearthv1.ForgetRevisionRequest]) (*connect.Response[hearthv1.ForgetRevisionResponse], error) {
	return respond(&hearthv1.ForgetRevisionResponse{}, s.n.ForgetRevision(ctx, r.Msg))
}

func (s server) ListImports(ctx context.Context, r *connect.Request[hearthv1.ListImportsRequest]) (*connect.Response[hearthv1.ListImportsResponse], error) {
	m, err := s.n.ListImports(ctx, r.Msg)
	return respond(m, err)
}

// TestOverTheWire runs both sides over real connections: the node through Connect, the manager through its handlers, and JSON for
// people.
func TestOverTheWire(t *testing.T) {
	n := newFakeNode(t, "node")
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewNodeServiceHandler(server{n: n}))
	nodeServer := httptest.NewServer(mux)
	defer nodeServer.CloseClientConnections()
	m, err := pool.New(pool.Config{Store: newMemory(), Nodes: map[string]pool.Node{
		"node": pool.Connect(hearthv1connect.NewNodeServiceClient(nodeServer.Client(), nodeServer.URL))}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	mux = http.NewServeMux()
	mux.Handle(hearthv1connect.NewAllocationServiceHandler(m))
	mux.Handle(hearthv1connect.NewFunctionServiceHandler(m))
	ours := httptest.NewServer(mux)
	defer ours.Close()

	// Run has begun when the first answer is there; before that calls are told to ask again.
	functions := hearthv1connect.NewFunctionServiceClient(ours.Client(), ours.URL)
	apply := &hearthv1.ApplyRequest{Function: &hearthv1.Function{Name: "hello", Spec: &hearthv1.FunctionSpec{Image: "a"}}}
	for {
		if _, err = functions.Apply(ctx, connect.NewRequest(apply)); connect.CodeOf(err) != connect.CodeUnavailable {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	stream, err := hearthv1connect.NewAllocationServiceClient(ours.Client(), ours.URL).Watch(ctx, connect.NewRequest(&hearthv1.WatchRequest{Subscriber: "g"}))
	if err != nil {
		t.Fatal(err)
	}
	res, err := ours.Client().Post(ours.URL+hearthv1connect.AllocationServiceAllocateProcedure, "application/json", strings.NewReader(`{"function":"hello"}`))
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if err != nil || res.StatusCode != http.StatusOK || !strings.Contains(string(body), "STATE_SERVING") {
		t.Fatalf("%s %s %v", res.Status, body, err)
	}
	if got := awaitServing(stream); got == "" {
		t.Errorf("the stream named no instance: %v", stream.Err())
	}
	cancel()
	_ = stream.Close()
	for i, call := range []error{wire(m.List), wire(m.ListInstances), wire(m.ListRuntimes)} {
		if call != nil {
			t.Errorf("%d: %v", i, call)
		}
	}
}

func wire[Req, Res any](call func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error)) error {
	_, err := call(context.Background(), connect.NewRequest(new(Req)))
	return err
}

func awaitServing(stream *connect.ServerStreamForClient[hearthv1.WatchResponse]) string {
	for stream.Receive() {
		for _, i := range stream.Msg().GetEndpoints().GetInstances() {
			if i.GetState() == hearthv1.State_STATE_SERVING {
				return i.GetId()
			}
		}
	}
	return ""
}
