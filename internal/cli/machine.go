package cli

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"connectrpc.com/connect"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/doctor"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// baseURL is what requests over Unix sockets name; the host means nothing.
const baseURL = "http://hearth"

// machine is the deployment of a single machine: its daemons' sockets are below a folder.
type machine struct{ run string }

func (a *app) machine() *machine { return &machine{a.run} }

func (m *machine) functions() hearthv1connect.FunctionServiceClient {
	return hearthv1connect.NewFunctionServiceClient(daemon.UnixClient(filepath.Join(m.run, stack.PoolSocket)), baseURL)
}

func (m *machine) runtimes() hearthv1connect.RuntimeServiceClient {
	return hearthv1connect.NewRuntimeServiceClient(daemon.UnixClient(filepath.Join(m.run, stack.PoolSocket)), baseURL)
}

func (m *machine) allocation() hearthv1connect.AllocationServiceClient {
	return hearthv1connect.NewAllocationServiceClient(daemon.UnixClient(filepath.Join(m.run, stack.PoolSocket)), baseURL)
}

func (m *machine) node() hearthv1connect.NodeServiceClient {
	return hearthv1connect.NewNodeServiceClient(daemon.UnixClient(filepath.Join(m.run, stack.NodeSocket)), baseURL)
}

// ApplyFunction has nothing to tell: the one call for it answers when all is done.
func (m *machine) ApplyFunction(ctx context.Context, f *hearthv1.Function, wait bool, _ func(string)) (*hearthv1.Function, error) {
	resp, err := m.functions().Apply(ctx, connect.NewRequest(&hearthv1.ApplyRequest{Function: f, Prepare: wait}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.GetFunction(), nil
}

func (m *machine) Functions(ctx context.Context) ([]*hearthv1.Function, error) {
	resp, err := m.functions().List(ctx, connect.NewRequest(&hearthv1.ListRequest{}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.GetFunctions(), nil
}

func (m *machine) DeleteFunction(ctx context.Context, name string) error {
	_, err := m.functions().Delete(ctx, connect.NewRequest(&hearthv1.DeleteRequest{Name: name}))
	return err
}

func (m *machine) ApplyRuntime(ctx context.Context, r *hearthv1.Runtime, wait bool, _ func(string)) (*hearthv1.Runtime, error) {
	resp, err := m.runtimes().ApplyRuntime(ctx, connect.NewRequest(&hearthv1.ApplyRuntimeRequest{Runtime: r, Prepare: wait}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.GetRuntime(), nil
}

func (m *machine) Runtimes(ctx context.Context) ([]*hearthv1.Runtime, error) {
	resp, err := m.runtimes().ListRuntimes(ctx, connect.NewRequest(&hearthv1.ListRuntimesRequest{}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.GetRuntimes(), nil
}

func (m *machine) DeleteRuntime(ctx context.Context, name string) error {
	_, err := m.runtimes().DeleteRuntime(ctx, connect.NewRequest(&hearthv1.DeleteRuntimeRequest{Name: name}))
	return err
}

func (m *machine) Imports(ctx context.Context, runtime string) (*hearthv1.ListImportsResponse, error) {
	resp, err := m.runtimes().ListImports(ctx, connect.NewRequest(&hearthv1.ListImportsRequest{Runtime: runtime}))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

func (m *machine) Instances(ctx context.Context, function string) ([]*hearthv1.Instance, error) {
	resp, err := m.functions().ListInstances(ctx, connect.NewRequest(&hearthv1.ListInstancesRequest{Function: function}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.GetInstances(), nil
}

func (m *machine) Logs(ctx context.Context, req *hearthv1.LogsRequest, line func(*hearthv1.LogsResponse) error) error {
	stream, err := m.node().Logs(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		if err := line(stream.Msg()); err != nil {
			return err
		}
	}
	return stream.Err()
}

// sandboxPool is what the pool of sandboxes is called, which `hearth up --pool-size` sizes.
const sandboxPool = "sandboxes"

// Pools are the sandboxes, and a pool of its name for each Runtime of which some are warm.
func (m *machine) Pools(ctx context.Context) ([]crd.WarmPool, error) {
	s, err := stack.ReadStatus(m.run)
	if err != nil {
		return nil, err
	}
	runtimes, err := m.Runtimes(ctx)
	if err != nil {
		return nil, err
	}
	list, err := m.Instances(ctx, "")
	if err != nil {
		return nil, err
	}
	n := count(list)
	pools := []crd.WarmPool{warmPool(sandboxPool, "", s.PoolSize, n.degrees[degreeName(hearthv1.Degree_DEGREE_SANDBOX)])}
	for _, r := range runtimes {
		if r.GetWarm() > 0 {
			pools = append(pools, warmPool(r.GetName(), r.GetName(), int(r.GetWarm()), n.runtimes[r.GetName()]))
		}
	}
	return pools, nil
}

func warmPool(name, runtime string, size, warm int) crd.WarmPool {
	wanted := int32(size)
	return crd.WarmPool{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: crd.WarmPoolSpec{Runtime: runtime, Size: &wanted},
		Status: crd.WarmPoolStatus{Size: wanted, Nodes: 1, Desired: wanted, Warm: int32(warm)},
	}
}

// ApplyPool sets how many of a Runtime are warm; its pool has its name. Nothing else can be changed while the machine's deployment is up.
func (m *machine) ApplyPool(ctx context.Context, pool *crd.WarmPool) (*crd.WarmPool, error) {
	if pool.Name == sandboxPool || pool.Spec.Runtime == "" {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the sandboxes of a single machine are as many as `hearth up --pool-size` says"))
	}
	if pool.Name != pool.Spec.Runtime || len(pool.Spec.NodeSelector) > 0 || len(pool.Spec.Images) > 0 || pool.Spec.Headroom > 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("on a single machine a pool is a runtime's, is called like it, and has a size only"))
	}
	size := int32(0)
	if pool.Spec.Size != nil {
		size = *pool.Spec.Size
	}
	if err := m.keepWarm(ctx, pool.Name, size); err != nil {
		return nil, err
	}
	out := warmPool(pool.Name, pool.Name, int(size), 0)
	return &out, nil
}

// DeletePool keeps no more of a Runtime warm.
func (m *machine) DeletePool(ctx context.Context, name string) error {
	if name == sandboxPool {
		return connect.NewError(connect.CodeFailedPrecondition, errors.New("the sandboxes of a single machine are as many as `hearth up --pool-size` says"))
	}
	return m.keepWarm(ctx, name, 0)
}

func (m *machine) keepWarm(ctx context.Context, runtime string, size int32) error {
	list, err := m.Runtimes(ctx)
	if err != nil {
		return err
	}
	for _, r := range list {
		if r.GetName() == runtime {
			r.Warm, r.Status = size, nil
			_, err := m.ApplyRuntime(ctx, r, false, nil)
			return err
		}
	}
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no runtime %s", runtime))
}

// Diagnose looks at the private containerd of the deployment.
func (m *machine) Diagnose(ctx context.Context) ([]doctor.Finding, error) {
	if _, err := stack.ReadStatus(m.run); err != nil {
		return nil, err
	}
	return diagnose(ctx, places{config: stack.ContainerdConfig(m.run), snapshotter: "hearth", socket: filepath.Join(m.run, stack.NodeSocket)})
}

func (m *machine) Registry(context.Context) (string, error) {
	s, err := stack.ReadStatus(m.run)
	if err != nil {
		return "", err
	}
	return s.Registry, nil
}

func (m *machine) GatewayURL(context.Context) (string, error) {
	s, err := stack.ReadStatus(m.run)
	if err != nil {
		return "", err
	}
	return s.Gateway, nil
}

// Gateway is reached by its URL.
func (m *machine) Gateway(ctx context.Context) (*gateway, error) {
	url, err := m.GatewayURL(ctx)
	if err != nil {
		return nil, err
	}
	return &gateway{url: url, close: func() {}}, nil
}
