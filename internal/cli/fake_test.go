package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/cli"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// fake is a deployment without containers: its sockets and status are as the real one's, what is behind them is not.
type fake struct {
	hearthv1connect.UnimplementedFunctionServiceHandler
	hearthv1connect.UnimplementedAllocationServiceHandler
	hearthv1connect.UnimplementedNodeServiceHandler
	hearthv1connect.UnimplementedImageServiceHandler
	hearthv1connect.UnimplementedRuntimeServiceHandler
	hearthv1connect.UnimplementedProfileServiceHandler

	run      string
	runtimes map[string]*hearthv1.Runtime
	imports  *hearthv1.ListImportsResponse
	event    http.Header // of the last CloudEvent
	function *hearthv1.Function
	address  string // of the only Instance
	applied  *hearthv1.ApplyRequest
	released *hearthv1.ReleaseRequest
	profile  *hearthv1.ImageProfile        // that the node makes and knows
	profiled *hearthv1.ProfileImageRequest // last
}

func (f *fake) Apply(_ context.Context, r *connect.Request[hearthv1.ApplyRequest]) (*connect.Response[hearthv1.ApplyResponse], error) {
	f.applied = r.Msg
	f.function = r.Msg.GetFunction()
	f.function.Status = &hearthv1.FunctionStatus{Revision: "hello-00001", Ready: 1, Reason: "all quiet"}
	return connect.NewResponse(&hearthv1.ApplyResponse{Function: f.function}), nil
}

func (f *fake) List(context.Context, *connect.Request[hearthv1.ListRequest]) (*connect.Response[hearthv1.ListResponse], error) {
	resp := &hearthv1.ListResponse{}
	if f.function != nil {
		resp.Functions = append(resp.Functions, f.function)
	}
	return connect.NewResponse(resp), nil
}

func (f *fake) Delete(_ context.Context, r *connect.Request[hearthv1.DeleteRequest]) (*connect.Response[hearthv1.DeleteResponse], error) {
	if r.Msg.GetName() != f.function.GetName() {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no function %s", r.Msg.GetName()))
	}
	f.function = nil
	return connect.NewResponse(&hearthv1.DeleteResponse{}), nil
}

func (f *fake) ApplyRuntime(_ context.Context, r *connect.Request[hearthv1.ApplyRuntimeRequest]) (*connect.Response[hearthv1.ApplyRuntimeResponse], error) {
	runtime := r.Msg.GetRuntime()
	if runtime.GetImage() == "reg/broken" {
		trace := "the runtime broken does not boot:\nTraceback (most recent call last):\n  File \"loader.py\", line 1\x1b[31m\nSyntaxError: no\n"
		return nil, connect.NewError(connect.CodeInternal, errors.New(trace))
	}
	runtime.Generation = f.runtimes[runtime.GetName()].GetGeneration() + 1
	f.runtimes[runtime.GetName()] = runtime
	return connect.NewResponse(&hearthv1.ApplyRuntimeResponse{Runtime: runtime}), nil
}

func (f *fake) ListRuntimes(context.Context, *connect.Request[hearthv1.ListRuntimesRequest]) (*connect.Response[hearthv1.ListRuntimesResponse], error) {
	resp := &hearthv1.ListRuntimesResponse{}
	for _, name := range slices.Sorted(maps.Keys(f.runtimes)) {
		resp.Runtimes = append(resp.Runtimes, f.runtimes[name])
	}
	return connect.NewResponse(resp), nil
}

// ListImports is both services'.
func (f *fake) ListImports(_ context.Context, r *connect.Request[hearthv1.ListImportsRequest]) (*connect.Response[hearthv1.ListImportsResponse], error) {
	if name := r.Msg.GetRuntime(); name != "" && f.runtimes[name] == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no runtime %s", name))
	}
	return connect.NewResponse(proto.CloneOf(f.imports)), nil
}

func (f *fake) DeleteRuntime(_ context.Context, r *connect.Request[hearthv1.DeleteRuntimeRequest]) (*connect.Response[hearthv1.DeleteRuntimeResponse], error) {
	name := r.Msg.GetName()
	switch {
	case f.runtimes[name] == nil:
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no runtime %s", name))
	case f.function.GetSpec().GetRuntime() == name:
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("function %s needs it", f.function.GetName()))
	}
	delete(f.runtimes, name)
	return connect.NewResponse(&hearthv1.DeleteRuntimeResponse{}), nil
}

func (f *fake) instance() *hearthv1.Instance {
	return &hearthv1.Instance{Id: "i-1", Node: "n", State: hearthv1.State_STATE_SERVING, Address: f.address, Function: "hello", Revision: "hello-00001"}
}

func (f *fake) ListInstances(context.Context, *connect.Request[hearthv1.ListInstancesRequest]) (*connect.Response[hearthv1.ListInstancesResponse], error) {
	return connect.NewResponse(&hearthv1.ListInstancesResponse{Instances: []*hearthv1.Instance{
		f.instance(), {Id: "i-2", State: hearthv1.State_STATE_WARM},
		{Id: "i-3", State: hearthv1.State_STATE_WARM, Degree: hearthv1.Degree_DEGREE_RUNTIME, Runtime: "python"},
		{Id: "i-4", State: hearthv1.State_STATE_FROZEN, Degree: hearthv1.Degree_DEGREE_REVISION, Runtime: "python", Function: "other",
			Pod: "i-0", Tenant: "acme", Group: "low"},
	}}), nil
}

func (f *fake) Allocate(context.Context, *connect.Request[hearthv1.AllocateRequest]) (*connect.Response[hearthv1.AllocateResponse], error) {
	return connect.NewResponse(&hearthv1.AllocateResponse{Instance: f.instance(), Phases: []*hearthv1.Phase{
		{Name: "claim", Duration: durationpb.New(time.Millisecond)},
		{Name: "process", Offset: durationpb.New(time.Millisecond), Duration: durationpb.New(3 * time.Millisecond)},
	}}), nil
}

func (f *fake) Release(_ context.Context, r *connect.Request[hearthv1.ReleaseRequest]) (*connect.Response[hearthv1.ReleaseResponse], error) {
	f.released = r.Msg
	return connect.NewResponse(&hearthv1.ReleaseResponse{Released: 1}), nil
}

func (f *fake) Logs(_ context.Context, _ *connect.Request[hearthv1.LogsRequest], s *connect.ServerStream[hearthv1.LogsResponse]) error {
	for _, line := range []string{"one", "two"} {
		if err := s.Send(&hearthv1.LogsResponse{InstanceId: "i-1", Line: []byte(line)}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) PullImage(_ context.Context, r *connect.Request[hearthv1.PullImageRequest], s *connect.ServerStream[hearthv1.PullImageResponse]) error {
	if r.Msg.GetImage() == "reg/none" {
		return connect.NewError(connect.CodeNotFound, errors.New("no such image"))
	}
	layers := []*hearthv1.LayerProgress{{State: hearthv1.LayerState_LAYER_STATE_PRESENT}, {State: hearthv1.LayerState_LAYER_STATE_FETCHING, Bytes: 20e6, BytesFetched: 5e6}}
	for _, m := range []*hearthv1.PullImageResponse{
		{}, {Layers: layers, BytesFetched: 5e6, BytesTotal: 20e6}, {Layers: layers, BytesFetched: 20e6, BytesTotal: 20e6, Id: "sha256:1d"},
	} {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) ListImages(context.Context, *connect.Request[hearthv1.ListImagesRequest]) (*connect.Response[hearthv1.ListImagesResponse], error) {
	return connect.NewResponse(&hearthv1.ListImagesResponse{Images: []*hearthv1.Image{{Id: "sha256:0123456789abcdef", Names: []string{"reg/hello:1"}, Bytes: 7e6, Pinned: true}}}), nil
}

// ServeHTTP is the gateway and the Instance.
func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.Header().Set("X-Seen", r.Header.Get("X-Sent"))
	switch r.URL.Path {
	case "/fn/hello/event":
		f.event = r.Header
	case "/fn/hello/broken":
		http.Error(w, "Traceback (most recent call last): …", http.StatusBadGateway)
	case "/fn/hello/busy":
		w.Header().Set("Retry-After", "2")
		http.Error(w, "busy", http.StatusServiceUnavailable)
	case "/fn/hello", "/fn/hello/path", "/":
		_, _ = fmt.Fprintf(w, "%s %s %q\n", r.Method, r.URL.RequestURI(), body)
	default:
		http.NotFound(w, r)
	}
}

func newFake(t *testing.T) *fake {
	t.Helper()
	run, err := os.MkdirTemp("/tmp", "hc-")
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{run: run, runtimes: map[string]*hearthv1.Runtime{}}
	web := httptest.NewServer(f)
	f.address = strings.TrimPrefix(web.URL, "http://")
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewFunctionServiceHandler(f))
	mux.Handle(hearthv1connect.NewAllocationServiceHandler(f))
	mux.Handle(hearthv1connect.NewNodeServiceHandler(f))
	mux.Handle(hearthv1connect.NewImageServiceHandler(f))
	mux.Handle(hearthv1connect.NewRuntimeServiceHandler(f))
	mux.Handle(hearthv1connect.NewProfileServiceHandler(f))
	ready := &daemon.Readiness{}
	ready.Set("node", errors.New("not seen yet"))
	mux.Handle("/readyz", ready)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	for _, socket := range []string{stack.NodeSocket, stack.PoolSocket} {
		go func() { done <- daemon.ServeUnix(ctx, filepath.Join(run, socket), mux) }()
	}
	t.Cleanup(func() {
		cancel()
		<-done
		<-done
		web.Close()
		_ = os.RemoveAll(run)
	})
	f.beUp(t, web.URL, f.registry(t))
	return f
}

// registry is the deployment's own, and empty.
func (f *fake) registry(t *testing.T) (address string) {
	server := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

// beUp writes what a supervisor writes, and holds its lock.
func (f *fake) beUp(t *testing.T, gateway, registry string) {
	t.Helper()
	pool := filepath.Join(f.run, stack.PoolSocket)
	status := stack.Status{Name: "test", State: stack.StateUp, PID: 1, Root: "/data", Run: f.run, Gateway: gateway, Registry: registry, Subnet: "10.0.0.0/20", PoolSize: 2, Containerd: "2.4.2",
		Daemons: []stack.Daemon{{Name: "poolmanager", PID: os.Getpid(), Restarts: 3, Started: time.Now(), Admin: pool}}}
	data, err := json.Marshal(status)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.run, "status.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(f.run, "hearth.lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lock.Close() })
	for _, socket := range []string{stack.NodeSocket, stack.PoolSocket} {
		for {
			conn, err := net.Dial("unix", filepath.Join(f.run, socket))
			if err == nil {
				_ = conn.Close()
				break
			}
		}
	}
}

func (f *fake) exec(t *testing.T, in string, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = cli.Exec(t.Context(), append([]string{"--run", f.run}, args...), strings.NewReader(in), &o, &e)
	return code, o.String(), e.String()
}
