// Package images is nodeagent's ImageService: it has containerd pull images, by the CRI as the kubelet does, and tells how far
// the snapshotter is with them, which neither the CRI nor containerd's own progress knows.
package images

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/distribution/reference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
	"github.com/hearth-serverless/hearth/internal/cripull"
	"github.com/hearth-serverless/hearth/snapshotter"
)

const (
	// lookEvery is the pause between two looks at a pull: a bar that moves ten times a second looks smooth.
	lookEvery = 100 * time.Millisecond
	// maxMessageBytes is what the CRI allows.
	maxMessageBytes = 16 << 20
)

// Config of a Service. All of it is required but Credentials and Fetch, which are those of a cripull.Puller.
type Config struct {
	// Containerd is its socket.
	Containerd  string
	Credentials func(ctx context.Context, ref string) (user, secret string, err error)
	Fetch       func(ctx context.Context, ref string) error
	// Progress tells of the last pull of an image, by its full reference.
	Progress func(ref string) (snapshotter.Pull, bool)
}

// Phases tells an engine of the last pull of an image, in its own words.
func Phases(s *snapshotter.Snapshotter) func(ref string) ([]instance.Phase, bool) {
	return func(ref string) (out []instance.Phase, ok bool) {
		pulled, ok := s.Trace(ref)
		for _, p := range pulled {
			out = append(out, instance.Phase{Name: p.Name, Start: p.Start, Duration: p.Duration})
		}
		return out, ok
	}
}

// Service implements hearthv1connect.ImageServiceHandler. It is safe for concurrent use.
type Service struct {
	cfg    Config
	images cri.ImageServiceClient
	puller cripull.Puller
}

// New makes a Service. containerd need not be there yet, and may go and come.
func New(cfg Config) (*Service, error) {
	conn, err := grpc.NewClient("unix://"+cfg.Containerd, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", cfg.Containerd, err)
	}
	client := cri.NewImageServiceClient(conn)
	return &Service{
		cfg: cfg, images: client,
		puller: cripull.Puller{Images: client, Credentials: cfg.Credentials, Fetch: cfg.Fetch},
	}, nil
}

// PullImage implements ImageService.
func (s *Service) PullImage(ctx context.Context, r *connect.Request[hearthv1.PullImageRequest], out *connect.ServerStream[hearthv1.PullImageResponse]) error {
	named, err := reference.ParseDockerRef(r.Msg.GetImage())
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("image %q: %w", r.Msg.GetImage(), err))
	}
	ctx, cancel := context.WithCancel(ctx)
	begun := time.Now()
	type result struct {
		id  string
		err error
	}
	pulled := make(chan result, 1)
	done := make(chan struct{})
	defer func() {
		cancel()
		<-done
	}()
	go func() {
		defer close(done)
		id, err := s.puller.Pull(ctx, named.String())
		pulled <- result{id, err}
	}()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	last := &hearthv1.PullImageResponse{}
	if err := out.Send(last); err != nil { // the answer's head goes with it
		return err
	}
	for {
		select {
		case <-tick.C:
			if now := s.progress(named.String(), begun); !proto.Equal(last, now) {
				last = now
				if err := out.Send(now); err != nil {
					return err
				}
			}
		case res := <-pulled:
			if res.err != nil {
				return connectError(res.err)
			}
			now := s.progress(named.String(), begun)
			now.Id = res.id
			return out.Send(now)
		}
	}
}

// progress is how far the pull is, unless what is known is of an earlier one.
func (s *Service) progress(ref string, begun time.Time) *hearthv1.PullImageResponse {
	out := &hearthv1.PullImageResponse{}
	pull, ok := s.cfg.Progress(ref)
	if !ok || pull.Ended && pull.Begun.Before(begun) {
		return out
	}
	for _, l := range pull.Layers {
		out.Layers = append(out.Layers, &hearthv1.LayerProgress{
			Digest: l.Digest.String(), State: states[l.State], Bytes: l.Bytes, BytesFetched: l.Fetched,
		})
		if l.State != snapshotter.LayerPresent {
			out.BytesTotal += l.Bytes
			out.BytesFetched += l.Fetched
		}
	}
	return out
}

var states = map[snapshotter.LayerState]hearthv1.LayerState{
	snapshotter.LayerWaiting:  hearthv1.LayerState_LAYER_STATE_WAITING,
	snapshotter.LayerFetching: hearthv1.LayerState_LAYER_STATE_FETCHING,
	snapshotter.LayerPresent:  hearthv1.LayerState_LAYER_STATE_PRESENT,
	snapshotter.LayerReady:    hearthv1.LayerState_LAYER_STATE_READY,
	snapshotter.LayerLeft:     hearthv1.LayerState_LAYER_STATE_LEFT,
	snapshotter.LayerFailed:   hearthv1.LayerState_LAYER_STATE_FAILED,
}

// ListImages implements ImageService.
func (s *Service) ListImages(ctx context.Context, _ *connect.Request[hearthv1.ListImagesRequest]) (*connect.Response[hearthv1.ListImagesResponse], error) {
	list, err := s.images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		return nil, connectError(fmt.Errorf("list images: %w", errgrpc.ToNative(err)))
	}
	out := &hearthv1.ListImagesResponse{}
	for _, i := range list.GetImages() {
		names := i.GetRepoTags()
		if len(names) == 0 {
			names = i.GetRepoDigests()
		}
		out.Images = append(out.Images, &hearthv1.Image{Id: i.GetId(), Names: names, Bytes: int64(i.GetSize()), Pinned: i.GetPinned()})
	}
	return connect.NewResponse(out), nil
}

// connectError gives an error the code that the proto promises.
func connectError(err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, context.Canceled), errdefs.IsCanceled(err):
		code = connect.CodeCanceled
	case errdefs.IsUnavailable(err):
		code = connect.CodeUnavailable
	case errdefs.IsNotFound(err):
		code = connect.CodeNotFound
	case errdefs.IsUnauthorized(err), errdefs.IsPermissionDenied(err):
		code = connect.CodeUnauthenticated
	case errdefs.IsResourceExhausted(err):
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, err)
}
