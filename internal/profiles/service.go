package profiles

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/prefetch"
)

const (
	defaultStarts = 3
	maxStarts     = 20
	defaultPort   = 8080
	// requestTime bounds the wait for an answer below 500 after a start, requestPause is between attempts.
	requestTime  = time.Minute
	requestPause = 100 * time.Millisecond
	// learnTime bounds the wait for what a start has taught, after it.
	learnTime = 2 * time.Minute
)

// Node makes starts. *instance.Engine is one.
type Node interface {
	Try(ctx context.Context, what *hearthv1.Revision, served func(ctx context.Context, address string) error) (ready time.Duration, err error)
	Pull(ctx context.Context, ref string) (chainID digest.Digest, err error)
	Lookup(ctx context.Context, ref string) (chainID digest.Digest, err error)
	Named(chainID digest.Digest) (ref string, dgst digest.Digest, ok bool)
}

// Known is what the node knows of images. *prefetch.Prefetcher is one.
type Known interface {
	Profile(image digest.Digest) ([]byte, bool)
	// Record has the next start of an image recorded, whatever is known of it. learnt gets how that ended.
	Record(image digest.Digest) (learnt <-chan error, err error)
	Usage() []prefetch.Usage
	// Kept is how many bytes are kept in memory for several images.
	Kept() int64
}

// Service implements hearthv1connect.ProfileServiceHandler. It is a value of its parts and safe for concurrent use.
type Service struct {
	Node  Node
	Known Known
}

// ProfileImage implements ProfileService.
func (s Service) ProfileImage(ctx context.Context, r *connect.Request[hearthv1.ProfileImageRequest], out *connect.ServerStream[hearthv1.ProfileImageResponse]) error {
	what, err := s.check(r.Msg)
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := out.Send(&hearthv1.ProfileImageResponse{}); err != nil { // the answer's head goes with it: a pull takes its time
		return err
	}
	chain, err := s.Node.Pull(ctx, what.Image)
	if err != nil {
		return coded(err)
	}
	for n := range int(cmp.Or(r.Msg.GetStarts(), defaultStarts)) {
		ready, err := s.record(ctx, chain, what, r.Msg.GetRequestPath())
		if err != nil {
			return coded(fmt.Errorf("start %d of image %s: %w", n+1, r.Msg.GetImage(), err))
		}
		if err := out.Send(&hearthv1.ProfileImageResponse{Start: int32(n + 1), ReadyTime: durationpb.New(ready)}); err != nil {
			return err
		}
	}
	p, err := s.profile(r.Msg.GetImage(), chain)
	if err != nil {
		return coded(err)
	}
	return out.Send(&hearthv1.ProfileImageResponse{Start: cmp.Or(r.Msg.GetStarts(), defaultStarts), Profile: p})
}

func (s Service) check(r *hearthv1.ProfileImageRequest) (*hearthv1.Revision, error) {
	switch {
	case r.GetStarts() < 0 || r.GetStarts() > maxStarts:
		return nil, fmt.Errorf("%d starts: at most %d are recorded", r.GetStarts(), maxStarts)
	case r.GetPort() < 0 || r.GetPort() > 65535:
		return nil, fmt.Errorf("port %d is not between 1 and 65535", r.GetPort())
	case r.GetRequestPath() != "" && !strings.HasPrefix(r.GetRequestPath(), "/"):
		return nil, fmt.Errorf("path %q does not begin with /", r.GetRequestPath())
	}
	return &hearthv1.Revision{
		Image: r.GetImage(), Port: cmp.Or(r.GetPort(), defaultPort), Env: r.GetEnv(), Command: r.GetCommand(), Args: r.GetArgs(), Concurrency: 1,
	}, nil
}

// record makes one start, and waits until what it reads is learnt.
func (s Service) record(ctx context.Context, chain digest.Digest, what *hearthv1.Revision, path string) (time.Duration, error) {
	learnt, err := s.Known.Record(chain)
	if err != nil {
		return 0, fmt.Errorf("this node learns nothing: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	ready, err := s.Node.Try(ctx, what, func(ctx context.Context, address string) error {
		if path == "" {
			return nil
		}
		return ask(ctx, "http://"+address+path)
	})
	if err != nil {
		return ready, err
	}
	ctx, cancel := context.WithTimeout(ctx, learnTime)
	defer cancel()
	select {
	case err := <-learnt:
		return ready, err
	case <-ctx.Done():
		return ready, fmt.Errorf("what it read was not learnt: %w", ctx.Err())
	}
}

// ask sends a request until it is answered by anything below 500.
func ask(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true}, // no proxy of the environment's either
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 16<<20)) // what it reads for its answer counts
			_ = resp.Body.Close()
			if resp.StatusCode < http.StatusInternalServerError {
				return nil
			}
			err = fmt.Errorf("GET %s: %s", url, resp.Status)
		}
		if !pause(ctx, requestPause) {
			return fmt.Errorf("no answer below 500: %w", err)
		}
	}
}

// GetProfile implements ProfileService.
func (s Service) GetProfile(ctx context.Context, r *connect.Request[hearthv1.GetProfileRequest]) (*connect.Response[hearthv1.GetProfileResponse], error) {
	chain, err := s.Node.Lookup(ctx, r.Msg.GetImage())
	if err != nil {
		return nil, coded(err)
	}
	p, err := s.profile(r.Msg.GetImage(), chain)
	if err != nil {
		return nil, coded(err)
	}
	return connect.NewResponse(&hearthv1.GetProfileResponse{Profile: p}), nil
}

func (s Service) profile(image string, chain digest.Digest) (*hearthv1.ImageProfile, error) {
	encoded, ok := s.Known.Profile(chain)
	if !ok {
		return nil, fmt.Errorf("the node knows nothing of what starts of %s read: %w", image, errdefs.ErrNotFound)
	}
	return &hearthv1.ImageProfile{Image: image, ChainId: chain.String(), Encoded: encoded}, nil
}

// GetCacheUsage implements ProfileService.
func (s Service) GetCacheUsage(context.Context, *connect.Request[hearthv1.GetCacheUsageRequest]) (*connect.Response[hearthv1.GetCacheUsageResponse], error) {
	out := &hearthv1.GetCacheUsageResponse{KeptBytes: s.Known.Kept()}
	for _, u := range s.Known.Usage() {
		ref, _, _ := s.Node.Named(u.Image)
		out.Images = append(out.Images, &hearthv1.CacheUsage{
			Image: ref, ChainId: u.Image.String(), Starts: int32(u.Starts),
			HitBytes: u.Hits, AheadBytes: u.Ahead, UsedBytes: u.Used, VainBytes: u.InVain, Time: durationpb.New(u.Took),
		})
	}
	return connect.NewResponse(out), nil
}

// coded gives an error the code that the proto promises.
func coded(err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, context.Canceled), errdefs.IsCanceled(err):
		code = connect.CodeCanceled
	case errdefs.IsInvalidArgument(err):
		code = connect.CodeInvalidArgument
	case errdefs.IsNotFound(err):
		code = connect.CodeNotFound
	case errdefs.IsFailedPrecondition(err):
		code = connect.CodeFailedPrecondition
	case errdefs.IsUnavailable(err):
		code = connect.CodeUnavailable
	case errdefs.IsUnauthorized(err), errdefs.IsPermissionDenied(err):
		code = connect.CodeUnauthenticated
	}
	return connect.NewError(code, err)
}
