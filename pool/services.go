package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
)

var (
	_ hearthv1connect.AllocationServiceHandler = (*Manager)(nil)
	_ hearthv1connect.FunctionServiceHandler   = (*Manager)(nil)
	_ hearthv1connect.RuntimeServiceHandler    = (*Manager)(nil)
)

// Allocate is AllocationService's.
func (m *Manager) Allocate(ctx context.Context, req *connect.Request[hearthv1.AllocateRequest]) (*connect.Response[hearthv1.AllocateResponse], error) {
	var deadline time.Time
	if t := req.Msg.GetDeadline(); t != nil {
		if err := t.CheckValid(); err != nil {
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("deadline: %w", err))
		}
		deadline = t.AsTime()
	}
	res, err := m.allocate(ctx, req.Msg.GetFunction(), req.Msg.GetId(), deadline)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// Release is AllocationService's.
func (m *Manager) Release(ctx context.Context, req *connect.Request[hearthv1.ReleaseRequest]) (*connect.Response[hearthv1.ReleaseResponse], error) {
	r := req.Msg
	if (r.GetInstanceId() == "") == (r.GetFunction() == "") {
		return nil, connect.NewError(connect.CodeInvalidArgument,
			errors.New(`either instance_id or function is needed, for example {"function":"hello"}`))
	}
	instances, revision, err := m.releaseAll(r)
	if err != nil {
		return nil, err
	}
	after := func(ctx context.Context) error {
		for _, i := range instances {
			select {
			case <-i.gone:
			case <-ctx.Done():
				return connect.NewError(codeOf(ctx), fmt.Errorf("instance %s still drains: %w", i.id, ctx.Err()))
			}
		}
		if !r.GetForgetImage() || revision == nil {
			return nil
		}
		return m.forgetOn(ctx, revision, true)
	}
	if r.GetWait() {
		err = after(ctx)
	} else if r.GetForgetImage() {
		m.mu.Lock()
		m.do(func(ctx context.Context) {
			if err := after(ctx); err != nil {
				m.log.Warn("forget an image after a release", "revision", revision.GetName(), "err", err)
			}
		})
		m.mu.Unlock()
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hearthv1.ReleaseResponse{Released: int32(len(instances))}), nil
}

// releaseAll begins what a request asks for, and names the Revision whose image it may want forgotten.
func (m *Manager) releaseAll(r *hearthv1.ReleaseRequest) (instances []*instance, revision *hearthv1.Revision, err error) {
	m.fact(func(now time.Time) {
		name := r.GetFunction()
		if i := m.instances[r.GetInstanceId()]; i != nil && i.state != hearthv1.State_STATE_GONE {
			instances, name = []*instance{i}, i.function
		}
		f := m.functions[name]
		switch {
		case f != nil:
			revision = f.revision
		case r.GetFunction() != "":
			err = noFunction(name)
			return
		}
		if r.GetFunction() != "" {
			instances = m.of(name)
		}
		for _, i := range instances {
			m.release(now, i, toDiscard)
		}
	})
	return instances, revision, err
}

// Watch is AllocationService's; see Subscribe.
func (m *Manager) Watch(ctx context.Context, req *connect.Request[hearthv1.WatchRequest], out *connect.ServerStream[hearthv1.WatchResponse]) error {
	return m.Subscribe(ctx, req.Msg.GetSubscriber(), out.Send)
}

// Apply is FunctionService's.
func (m *Manager) Apply(ctx context.Context, req *connect.Request[hearthv1.ApplyRequest]) (*connect.Response[hearthv1.ApplyResponse], error) {
	name, spec := req.Msg.GetFunction().GetName(), req.Msg.GetFunction().GetSpec()
	if err := Validate(name, spec); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := m.apply(name, spec); err != nil {
		return nil, err
	}
	m.awaitKnown(ctx, name)
	if req.Msg.GetPrepare() {
		if err := m.awaitPrepared(ctx, name); err != nil {
			return nil, err
		}
	}
	f, err := m.get(name)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hearthv1.ApplyResponse{Function: f}), nil
}

// Get is FunctionService's.
func (m *Manager) Get(_ context.Context, req *connect.Request[hearthv1.GetRequest]) (*connect.Response[hearthv1.GetResponse], error) {
	f, err := m.get(req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hearthv1.GetResponse{Function: f}), nil
}

// List is FunctionService's; in the order of names.
func (m *Manager) List(context.Context, *connect.Request[hearthv1.ListRequest]) (*connect.Response[hearthv1.ListResponse], error) {
	all := m.Functions()
	slices.SortFunc(all, func(a, b *hearthv1.Function) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return connect.NewResponse(&hearthv1.ListResponse{Functions: all}), nil
}

// Delete is FunctionService's.
func (m *Manager) Delete(ctx context.Context, req *connect.Request[hearthv1.DeleteRequest]) (*connect.Response[hearthv1.DeleteResponse], error) {
	if err := m.delete(ctx, req.Msg.GetName()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&hearthv1.DeleteResponse{}), nil
}

// shown is an Instance as people and controllers see it: the state is the node's, but for what is being made or drained here.
func (i *instance) shown() *hearthv1.Instance {
	said := i.message()
	if i.making && said.State == hearthv1.State_STATE_UNSPECIFIED {
		said.State = hearthv1.State_STATE_CREATING
	}
	if i.leaving() {
		said.State = hearthv1.State_STATE_DRAINING
	}
	return said
}

// ListInstances is FunctionService's; oldest first.
func (m *Manager) ListInstances(_ context.Context, req *connect.Request[hearthv1.ListInstancesRequest]) (*connect.Response[hearthv1.ListInstancesResponse], error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	res := &hearthv1.ListInstancesResponse{}
	for _, i := range m.instances {
		if i.state == hearthv1.State_STATE_GONE || req.Msg.GetFunction() != "" && i.function != req.Msg.GetFunction() {
			continue
		}
		res.Instances = append(res.Instances, i.shown())
	}
	slices.SortFunc(res.Instances, func(a, b *hearthv1.Instance) int {
		return cmp.Or(a.GetCreatedAt().AsTime().Compare(b.GetCreatedAt().AsTime()), cmp.Compare(a.GetId(), b.GetId()))
	})
	return connect.NewResponse(res), nil
}
