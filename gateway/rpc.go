package gateway

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
)

const maxMessageBytes = 16 << 20

// Remote is poolmanager over RPC.
type Remote struct {
	allocation hearthv1connect.AllocationServiceClient
	load       hearthv1connect.LoadServiceClient
}

var _ Pool = (*Remote)(nil)

// NewRemote returns the poolmanager that answers at a base URL through client, which decides how to connect.
func NewRemote(client connect.HTTPClient, baseURL string) *Remote {
	bounded := connect.WithReadMaxBytes(maxMessageBytes)
	return &Remote{
		allocation: hearthv1connect.NewAllocationServiceClient(client, baseURL, bounded),
		load:       hearthv1connect.NewLoadServiceClient(client, baseURL, bounded),
	}
}

// Allocate claims one Instance. Errors carry connect codes.
func (r *Remote) Allocate(ctx context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
	res, err := r.allocation.Allocate(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, fmt.Errorf("allocate an instance of %s: %w", req.GetFunction(), err)
	}
	return res.Msg, nil
}

// Watch calls event for every message until the stream ends.
func (r *Remote) Watch(ctx context.Context, subscriber string, event func(*hearthv1.WatchResponse)) error {
	stream, err := r.allocation.Watch(ctx, connect.NewRequest(&hearthv1.WatchRequest{Subscriber: subscriber}))
	if err != nil {
		return fmt.Errorf("watch poolmanager: %w", err)
	}
	for stream.Receive() {
		event(stream.Msg())
	}
	if err := errors.Join(stream.Err(), stream.Close()); err != nil {
		return fmt.Errorf("watch poolmanager: %w", err)
	}
	return errors.New("watch poolmanager: the stream ended")
}

// Report delivers measured load.
func (r *Remote) Report(ctx context.Context, req *hearthv1.ReportRequest) error {
	if _, err := r.load.Report(ctx, connect.NewRequest(req)); err != nil {
		return fmt.Errorf("report load: %w", err)
	}
	return nil
}

// Release gives an Instance back.
func (r *Remote) Release(ctx context.Context, req *hearthv1.ReleaseRequest) error {
	if _, err := r.allocation.Release(ctx, connect.NewRequest(req)); err != nil {
		return fmt.Errorf("release instance %s: %w", req.GetInstanceId(), err)
	}
	return nil
}
