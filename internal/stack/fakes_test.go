package stack_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// TestMain lets this test binary be the daemons, by links of their names to it: small ones that take the same flags.
func TestMain(m *testing.M) {
	name := filepath.Base(os.Args[0])
	flags := map[string][]string{
		"nodeagent":   {"name", "root", "socket", "containerd-socket", "snapshotter-root", "snapshotter-socket", "image-service-socket", "cgroup-parent", "network-dir", "hosts-dir", "share-profiles", "sidecar"},
		"poolmanager": {"store", "rpc-socket", "node-socket", "pool-size"},
		"gateway":     {"name", "address", "pool-socket"},
	}[name]
	if c := os.Getenv("TEST_SUPERVISOR"); flags == nil && c != "" {
		os.Exit(superviseForTest(c))
	}
	if flags == nil {
		os.Exit(m.Run())
	}
	values := map[string]*string{}
	os.Exit(daemon.Main(daemon.Service{
		Name: name,
		Flags: func(f *pflag.FlagSet) {
			for _, flag := range flags {
				values[flag] = f.String(flag, "", "")
			}
		},
		Run: func(ctx context.Context, rt *daemon.Runtime) error {
			rt.Ready.Set("fake", nil)
			if name != "nodeagent" {
				<-ctx.Done()
				return nil
			}
			return fakeNode(ctx, *values["socket"], *values["snapshotter-root"], *values["snapshotter-socket"])
		},
	}))
}

// node has no Instances.
type node struct {
	hearthv1connect.UnimplementedNodeServiceHandler
}

func (node) WatchInstances(_ context.Context, _ *connect.Request[hearthv1.WatchInstancesRequest], s *connect.ServerStream[hearthv1.WatchInstancesResponse]) error {
	return s.Send(&hearthv1.WatchInstancesResponse{Event: &hearthv1.WatchInstancesResponse_Synced{Synced: true}})
}

// fakeNode serves NodeService, and containerd's plainest snapshotter as if it were Hearth's.
func fakeNode(ctx context.Context, socket, root, snapshots string) error {
	sn, err := native.NewSnapshotter(root)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewNodeServiceHandler(node{}))
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error { return daemon.ServeUnix(ctx, socket, mux) })
	work.Go(func() error { return daemon.ServeUnixWith(ctx, snapshots, server) })
	return work.Wait()
}

// superviseForTest is a supervisor in a process of its own; text is ROOT:RUN:NAME:TOOLS:PAUSE.
func superviseForTest(text string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	w := strings.Split(text, ":")
	c := stack.Config{Root: w[0], Run: w[1], Bin: w[0] + "-bin", Name: w[2], Tools: w[3], PauseImage: w[4], GatewayAddress: "127.0.0.1:0"}
	if err := stack.Run(ctx, c, func(*stack.Status) { fmt.Println("ready") }); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}
