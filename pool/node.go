package pool

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
)

// Node is what the pool needs of a node: NodeService without what is for people. It has more than four methods because it is one
// thing with one life, whose calls are all about the same Instances. Errors carry connect codes. Safe for concurrent use.
type Node interface {
	CreateInstance(context.Context, *hearthv1.CreateInstanceRequest) (*hearthv1.Instance, error)
	Activate(context.Context, *hearthv1.ActivateRequest) (*hearthv1.ActivateResponse, error)
	Freeze(context.Context, *hearthv1.FreezeRequest) (*hearthv1.Instance, error)
	Discard(context.Context, *hearthv1.DiscardRequest) error
	// Watch calls event for each message of WatchInstances, one after the other, until the stream ends, and says why it did. It
	// ends when event returns an error. From its beginning on the node refuses claims of earlier terms.
	Watch(ctx context.Context, epoch int64, event func(*hearthv1.WatchInstancesResponse) error) error
	PrepareRevision(context.Context, *hearthv1.PrepareRevisionRequest) (*hearthv1.PrepareRevisionResponse, error)
	ForgetRevision(context.Context, *hearthv1.ForgetRevisionRequest) error
	ListImports(context.Context, *hearthv1.ListImportsRequest) (*hearthv1.ListImportsResponse, error)
}

// Connect makes a Node of a client of its NodeService.
func Connect(c hearthv1connect.NodeServiceClient) Node { return remote{c} }

type remote struct {
	c hearthv1connect.NodeServiceClient
}

func (r remote) CreateInstance(ctx context.Context, m *hearthv1.CreateInstanceRequest) (*hearthv1.Instance, error) {
	res, err := r.c.CreateInstance(ctx, connect.NewRequest(m))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetInstance(), nil
}

func (r remote) Activate(ctx context.Context, m *hearthv1.ActivateRequest) (*hearthv1.ActivateResponse, error) {
	res, err := r.c.Activate(ctx, connect.NewRequest(m))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (r remote) Freeze(ctx context.Context, m *hearthv1.FreezeRequest) (*hearthv1.Instance, error) {
	res, err := r.c.Freeze(ctx, connect.NewRequest(m))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetInstance(), nil
}

func (r remote) Discard(ctx context.Context, m *hearthv1.DiscardRequest) error {
	_, err := r.c.Discard(ctx, connect.NewRequest(m))
	return err
}

func (r remote) Watch(ctx context.Context, epoch int64, event func(*hearthv1.WatchInstancesResponse) error) (err error) {
	stream, err := r.c.WatchInstances(ctx, connect.NewRequest(&hearthv1.WatchInstancesRequest{Epoch: epoch}))
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }() // what it could say was said by Err
	for stream.Receive() {
		if err := event(stream.Msg()); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return fmt.Errorf("stream of instances ended")
}

func (r remote) PrepareRevision(ctx context.Context, m *hearthv1.PrepareRevisionRequest) (*hearthv1.PrepareRevisionResponse, error) {
	res, err := r.c.PrepareRevision(ctx, connect.NewRequest(m))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (r remote) ForgetRevision(ctx context.Context, m *hearthv1.ForgetRevisionRequest) error {
	_, err := r.c.ForgetRevision(ctx, connect.NewRequest(m))
	return err
}

func (r remote) ListImports(ctx context.Context, m *hearthv1.ListImportsRequest) (*hearthv1.ListImportsResponse, error) {
	res, err := r.c.ListImports(ctx, connect.NewRequest(m))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}
