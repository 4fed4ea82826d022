package bench

import (
	"context"
	"fmt"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc/metadata"
)

// prepareEvery is the pause between the snapshots that are prepared beside a pull.
const prepareEvery = 20 * time.Millisecond

// bystander prepares snapshots beside a pull, as other containers of the node would, until ctx is done, and returns the longest that
// one of them took. They have no parent, and so nothing to wait for but what the pull holds.
func (n *node) bystander(ctx context.Context) (longest time.Duration, err error) {
	client := snapshotsapi.NewSnapshotsClient(n.conn)
	calls := metadata.AppendToOutgoingContext(context.WithoutCancel(ctx), "containerd-namespace", "k8s.io")
	kept := map[string]string{"containerd.io/gc.root": "bench"} // containerd's collector leaves it to us
	for i := 0; ctx.Err() == nil; i++ {
		key := fmt.Sprintf("bystander-%d", i)
		start := time.Now()
		if _, err := client.Prepare(calls, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: n.snapshotter, Key: key, Labels: kept}); err != nil {
			return longest, fmt.Errorf("prepare a snapshot beside the pull: %w", err)
		}
		longest = max(longest, time.Since(start))
		if _, err := client.Remove(calls, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: n.snapshotter, Key: key}); err != nil {
			return longest, fmt.Errorf("remove a snapshot beside the pull: %w", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(prepareEvery):
		}
	}
	return longest, nil
}

// pullBeside pulls while others prepare snapshots, and returns the longest that one of those took too.
func (n *node) pullBeside(ctx context.Context, ref string) (took, longest time.Duration, err error) {
	beside, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		var err error
		longest, err = n.bystander(beside)
		ended <- err
	}()
	took, err = n.pull(ctx, ref)
	cancel()
	if waited := <-ended; err == nil {
		err = waited
	}
	return took, longest, err
}
