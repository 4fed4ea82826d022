package stack

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
)

const (
	discardTime  = 20 * time.Second // for all Instances together
	discardGrace = 2 * time.Second  // for a Function's process between SIGTERM and SIGKILL
	discardAhead = 4                // Instances that are ended at once
)

// discardAll has nodeagent end every Instance of its node.
func discardAll(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, discardTime)
	defer cancel()
	client := daemon.UnixClient(socket)
	defer client.CloseIdleConnections()
	node := hearthv1connect.NewNodeServiceClient(client, "http://hearth")
	ids, err := instances(ctx, node)
	if err != nil {
		return fmt.Errorf("list instances: %w", err)
	}
	work, ctx := errgroup.WithContext(ctx)
	work.SetLimit(discardAhead)
	for _, id := range ids {
		work.Go(func() error {
			_, err := node.Discard(ctx, connect.NewRequest(&hearthv1.DiscardRequest{InstanceId: id, Grace: durationpb.New(discardGrace)}))
			if err != nil {
				return fmt.Errorf("discard instance %s: %w", id, err)
			}
			return nil
		})
	}
	return work.Wait()
}

func instances(ctx context.Context, node hearthv1connect.NodeServiceClient) ([]string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := node.WatchInstances(ctx, connect.NewRequest(&hearthv1.WatchInstancesRequest{}))
	if err != nil {
		return nil, err
	}
	var ids []string
	for stream.Receive() {
		if stream.Msg().GetSynced() {
			return ids, nil
		}
		if i := stream.Msg().GetInstance(); i != nil {
			ids = append(ids, i.GetId())
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return nil, errors.New("the list ended before it was complete")
}
