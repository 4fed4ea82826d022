package snapshotter

import (
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"google.golang.org/grpc"
)

// Register adds containerd's snapshots service, served by s, to a gRPC server. containerd wants it on a Unix socket named in a
// proxy plugin with the export enable_remote_snapshot_annotations = "true", and without the capability "rebase".
func Register(r grpc.ServiceRegistrar, s *Snapshotter) {
	snapshotsapi.RegisterSnapshotsServer(r, snapshotservice.FromSnapshotter(s))
}
