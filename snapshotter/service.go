package snapshotter

import (
	"context"
	"errors"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"google.golang.org/grpc"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// Register adds containerd's snapshots service, served by s, to a gRPC server. containerd wants it on a Unix socket named in a
// proxy plugin with the export enable_remote_snapshot_annotations = "true", and without the capability "rebase".
func Register(r grpc.ServiceRegistrar, s *Snapshotter) {
	snapshotsapi.RegisterSnapshotsServer(r, snapshotservice.FromSnapshotter(s))
}

// Serve serves containerd on a Unix socket until ctx is done, and then closes s. A Prepare under way is cut off: containerd asks
// again, and it would hold up the end.
func (s *Snapshotter) Serve(ctx context.Context, socket string) error {
	server := grpc.NewServer()
	Register(server, s)
	return errors.Join(daemon.ServeUnixWith(ctx, socket, server), s.Close())
}
