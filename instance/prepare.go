package instance

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// PrepareRevision implements NodeService.
func (e *Engine) PrepareRevision(ctx context.Context, req *connect.Request[hearthv1.PrepareRevisionRequest]) (
	*connect.Response[hearthv1.PrepareRevisionResponse], error,
) {
	answer, err := e.prepare(ctx, req.Msg)
	if err != nil {
		return nil, connectError(err)
	}
	return connect.NewResponse(answer), nil
}

func (e *Engine) prepare(ctx context.Context, req *hearthv1.PrepareRevisionRequest) (*hearthv1.PrepareRevisionResponse, error) {
	ref, code, err := checkRevision(req.Revision)
	if err != nil {
		return nil, err
	}
	if err := e.mayShare(req.Revision.Group); err != nil {
		return nil, err
	}
	if req.Snapshots < 0 || req.Snapshots > maxSnapshots {
		return nil, invalid("%d snapshots are not between 0 and %d", req.Snapshots, maxSnapshots)
	}
	if err := e.open(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, pullTime)
	defer cancel()
	t := newTrace(time.Now())
	e.library.forget(ref) // whoever prepares wants to know, not to remember
	img, err := e.library.ensure(ctx, ref, t)
	if err != nil {
		return nil, err
	}
	if code != "" {
		e.library.forget(code)
		if img, err = e.codes.want(ctx, code, req.Revision.Name, t); err != nil {
			return nil, err
		}
		return e.prepared(img, t), nil
	}
	begin := time.Now()
	if err := e.shelf.want(ctx, img, req.Revision.Name, int(req.Snapshots)); err != nil {
		return nil, err
	}
	t.since(phaseSnapshot, begin)
	e.metrics.prepared.Set(float64(e.shelf.count()))
	return e.prepared(img, t), nil
}

// prepared names what is at hand, also for the first start, which asks for it by that name.
func (e *Engine) prepared(img *image, t *trace) *hearthv1.PrepareRevisionResponse {
	pinned := *img
	pinned.Ref = byDigest(img)
	e.library.remember(&pinned)
	return &hearthv1.PrepareRevisionResponse{Image: pinned.Ref, Phases: t.phases()}
}

// byDigest names an image so that it can never mean another one.
func byDigest(img *image) string {
	named, err := normalize(img.Ref)
	if err != nil {
		return img.Ref
	}
	pinned, err := reference.WithDigest(reference.TrimNamed(named), img.Digest)
	if err != nil {
		return img.Ref
	}
	return pinned.String()
}

// ForgetRevision implements NodeService. An image stays if another Revision or an Instance uses it.
func (e *Engine) ForgetRevision(ctx context.Context, req *connect.Request[hearthv1.ForgetRevisionRequest]) (
	*connect.Response[hearthv1.ForgetRevisionResponse], error,
) {
	if err := e.forget(ctx, req.Msg); err != nil {
		return nil, connectError(err)
	}
	return connect.NewResponse(&hearthv1.ForgetRevisionResponse{}), nil
}

func (e *Engine) forget(ctx context.Context, req *hearthv1.ForgetRevisionRequest) error {
	ref, err := checkForgotten(req.Revision)
	if err != nil {
		return err
	}
	if err := e.open(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, r := range e.shelf.forget(req.Revision.Name) {
		e.shelf.discard(ctx, r)
	}
	e.codes.forget(ctx, req.Revision.Name)
	e.metrics.prepared.Set(float64(e.shelf.count()))
	if !req.RemoveImage {
		return nil
	}
	img, err := e.library.look(ctx, ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if e.shelf.wants(img) || e.codes.uses(img.ChainID) || e.uses(img) {
		return nil
	}
	e.library.forgetImage(img)
	return e.backend.RemoveImage(ctx, ref)
}

// uses tells whether an Instance is made of an image, or is about to be.
func (e *Engine) uses(img *image) bool {
	for _, i := range e.all() {
		i.mu.Lock()
		used := i.image == img.Ref || i.chainID == img.ChainID
		i.mu.Unlock()
		if used {
			return true
		}
	}
	return false
}
