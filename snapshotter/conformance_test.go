package snapshotter_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hearth-serverless/hearth/snapshotter"
)

// TestConformance is containerd's own suite, on the snapshotter itself and as containerd sees it: through gRPC on a Unix socket.
func TestConformance(t *testing.T) {
	inForms(t, func(t *testing.T, form snapshotter.Form) {
		t.Run("direct", func(t *testing.T) {
			testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := snapshotter.New(snapshotter.Config{Root: root, Registry: newFake(), Layers: newFake(), Form: form})
				if err != nil {
					return nil, nil, err
				}
				return s, s.Close, nil
			})
		})
		t.Run("proxy", func(t *testing.T) {
			testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := snapshotter.New(snapshotter.Config{Root: root, Registry: newFake(), Layers: newFake(), Form: form})
				if err != nil {
					return nil, nil, err
				}
				client, stop, err := serve(s, filepath.Join(root, "s"))
				return client, func() error { return errors.Join(stop(), s.Close()) }, err
			})
		})
	})
}

// serve puts s behind a Unix socket and returns containerd's client of it.
func serve(s *snapshotter.Snapshotter, socket string) (snapshots.Snapshotter, func() error, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	server := grpc.NewServer()
	snapshotter.Register(server, s)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	stop := func() error {
		err := conn.Close()
		server.GracefulStop()
		return errors.Join(err, <-done)
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "hearth"), stop, nil
}
