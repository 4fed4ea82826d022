package stack_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	containerd "github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
)

const (
	pool      = 2                // sandboxes kept warm
	recovery  = 10 * time.Second // after which everything must serve again
	settling  = 20 * time.Second // for what is cleared up in the background
	longStart = 40 * time.Second // for a start that has nothing to prove about time
)

// deployment is the whole of Hearth on this machine, for one test.
type deployment struct {
	config     stack.Config
	status     *stack.Status
	functions  hearthv1connect.FunctionServiceClient
	allocation hearthv1connect.AllocationServiceClient
	runtimes   hearthv1connect.RuntimeServiceClient
	node       hearthv1connect.NodeServiceClient
	containerd *containerd.Client
	sandboxes  cri.RuntimeServiceClient
	web        *web
	booted     map[string]int // how many Instances of each Runtime wait

	cancel context.CancelFunc
	ended  chan error
}

// newConfig is of a deployment that shares nothing with any other. Its folders are gone when the test ends.
func newConfig(t *testing.T) stack.Config {
	t.Helper()
	if shop == nil {
		t.Skip("containers, mounts and network namespaces need root")
	}
	run, err := os.MkdirTemp("", "hs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	return stack.Config{
		Name: fmt.Sprintf("test-%08x", rand.Uint32()), Root: filepath.Join(t.TempDir(), "root"), Run: run,
		Tools: shop.tools, Bin: shop.bin, PauseImage: shop.pause, PoolSize: pool,
		GatewayAddress: "127.0.0.1:0", Registry: true, RegistryAddress: "127.0.0.1:0",
	}
}

// start brings a deployment up. When the test ends it is ended, if it was not before, and must leave nothing.
func start(t *testing.T, change ...func(*stack.Config)) *deployment {
	t.Helper()
	d := &deployment{config: newConfig(t), ended: make(chan error, 1), booted: map[string]int{}}
	for _, c := range change {
		c(&d.config)
	}
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	up := make(chan *stack.Status, 1)
	go func() { d.ended <- stack.Run(ctx, d.config, func(s *stack.Status) { up <- s }) }()
	select {
	case d.status = <-up:
	case err := <-d.ended:
		cancel()
		t.Fatalf("the deployment does not come up: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			d.showLogs(t)
		}
		d.stop(t)
	})
	d.connect(t)
	return d
}

// stop ends the deployment and says what it left. It may be called again.
func (d *deployment) stop(t *testing.T) {
	t.Helper()
	if d.cancel == nil {
		return
	}
	d.cancel()
	d.cancel = nil
	if err := <-d.ended; err != nil {
		t.Errorf("the deployment does not end well: %v", err)
	}
	vanished(t, d.config, d.status)
}

func (d *deployment) connect(t *testing.T) {
	t.Helper()
	client := daemon.UnixClient(filepath.Join(d.config.Run, stack.PoolSocket))
	d.functions = hearthv1connect.NewFunctionServiceClient(client, "http://hearth")
	d.allocation = hearthv1connect.NewAllocationServiceClient(client, "http://hearth")
	d.runtimes = hearthv1connect.NewRuntimeServiceClient(client, "http://hearth")
	node := daemon.UnixClient(filepath.Join(d.config.Run, stack.NodeSocket))
	d.node = hearthv1connect.NewNodeServiceClient(node, "http://hearth")
	d.web = newWeb(d.status.Gateway)
	socket := filepath.Join(d.config.Run, stack.ContainerdSocket)
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	d.sandboxes = cri.NewRuntimeServiceClient(conn)
	if d.containerd, err = containerd.NewWithConn(conn, containerd.WithDefaultNamespace("k8s.io")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		node.CloseIdleConnections()
		d.web.close()
		_ = conn.Close()
	})
}

// deploy makes a Function that answers with its own name at /env?name=ANSWER.
func (d *deployment) deploy(t *testing.T, name, image string, prepare bool, change ...func(*hearthv1.FunctionSpec)) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	spec := &hearthv1.FunctionSpec{Image: image, Env: map[string]string{"ANSWER": name}, Scaling: &hearthv1.Scaling{}}
	for _, c := range change {
		c(spec)
	}
	_, err := d.functions.Apply(ctx, connect.NewRequest(&hearthv1.ApplyRequest{Function: &hearthv1.Function{Name: name, Spec: spec}, Prepare: prepare}))
	return err
}

func (d *deployment) mustDeploy(t *testing.T, name, image string, change ...func(*hearthv1.FunctionSpec)) {
	t.Helper()
	if err := d.deploy(t, name, image, true, change...); err != nil {
		t.Fatalf("deploy %s: %v", name, err)
	}
}

// remove deletes a Function, with its Instances.
func (d *deployment) remove(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if _, err := d.functions.Delete(ctx, connect.NewRequest(&hearthv1.DeleteRequest{Name: name})); err != nil {
		t.Errorf("delete %s: %v", name, err)
	}
}

// toZero ends all Instances of a Function.
func (d *deployment) toZero(t *testing.T, function string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if _, err := d.allocation.Release(ctx, connect.NewRequest(&hearthv1.ReleaseRequest{Function: function, Wait: true})); err != nil {
		t.Fatalf("release %s: %v", function, err)
	}
}

func (d *deployment) instances(ctx context.Context, function string) ([]*hearthv1.Instance, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	list, err := d.functions.ListInstances(ctx, connect.NewRequest(&hearthv1.ListInstancesRequest{Function: function}))
	if err != nil {
		return nil, err
	}
	return list.Msg.GetInstances(), nil
}

// pid of a daemon, 0 while it does not run.
func (d *deployment) pid(t *testing.T, name string) int {
	t.Helper()
	s, err := stack.ReadStatus(d.config.Run)
	if err != nil {
		t.Fatal(err)
	}
	for _, each := range s.Daemons {
		if each.Name == name {
			return each.PID
		}
	}
	t.Fatalf("the deployment has no %s", name)
	return 0
}

// snapshotterDir is a folder of the snapshotter's.
func (d *deployment) snapshotterDir(name string) string {
	return filepath.Join(d.config.Root, "snapshotter", name)
}

func (d *deployment) showLogs(t *testing.T) {
	files, _ := filepath.Glob(filepath.Join(stack.LogDir(d.config.Root), "*.log"))
	for _, file := range files {
		data, _ := os.ReadFile(file)
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		t.Logf("the end of %s:\n%s", filepath.Base(file), strings.Join(lines[max(0, len(lines)-25):], "\n"))
	}
}
