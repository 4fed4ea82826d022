package keychain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// maxMessageBytes is what the kubelet and containerd allow one another.
const maxMessageBytes = 16 << 20

// Service is the CRI's ImageService, passed on to containerd's. It is safe for concurrent use.
type Service struct {
	cri.UnimplementedImageServiceServer

	conn *grpc.ClientConn
	next cri.ImageServiceClient
	log  *slog.Logger
	book book

	fetch func(ctx context.Context, ref string) error // set by Serve
}

// New makes a Service before the containerd that listens on a socket. It need not be there yet, and may go and come.
func New(containerd string, log *slog.Logger) (*Service, error) {
	conn, err := grpc.NewClient("unix://"+containerd, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", containerd, err)
	}
	return &Service{conn: conn, next: cri.NewImageServiceClient(conn), log: log}, nil
}

// Serve serves the kubelet on a Unix socket until ctx is done, and then ends the connection to containerd; without a socket it
// only waits. Pulls under way are cut off, as when containerd itself is restarted: the kubelet asks again. Before each pull fetch,
// if it is not nil, brings the image's layers, so that containerd need not hold its locks while they come.
func (s *Service) Serve(ctx context.Context, socket string, fetch func(ctx context.Context, ref string) error) error {
	s.fetch = fetch
	if socket == "" {
		<-ctx.Done()
		return s.conn.Close()
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessageBytes), grpc.MaxSendMsgSize(maxMessageBytes))
	cri.RegisterImageServiceServer(server, s)
	return errors.Join(daemon.ServeUnixWith(ctx, socket, server), s.conn.Close())
}

// forward hands the caller's metadata on. Its deadline and its cancelling go with the context.
func forward(ctx context.Context) context.Context {
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		return metadata.NewOutgoingContext(ctx, md.Copy())
	}
	return ctx
}

// PullImage remembers the credentials before containerd asks the snapshotter for the first layer.
func (s *Service) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	e, err := newEntry(r.GetImage().GetImage(), r.GetAuth())
	if err != nil {
		s.log.Warn("credentials of a pull are of no use", "image", r.GetImage().GetImage(), "error", err) // containerd tells the caller
	}
	if e == nil {
		return s.pull(ctx, r)
	}
	done := s.book.add(e)
	resp, err := s.pull(ctx, r)
	done(err == nil)
	return resp, err
}

func (s *Service) pull(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	if s.fetch != nil {
		if err := s.fetch(ctx, r.GetImage().GetImage()); err != nil {
			s.log.Debug("image is left to containerd's pull", "image", r.GetImage().GetImage(), "error", err) // which says what is wrong
		}
	}
	return s.next.PullImage(forward(ctx), r)
}

// ListImages passes the call on.
func (s *Service) ListImages(ctx context.Context, r *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	return s.next.ListImages(forward(ctx), r)
}

// ImageStatus passes the call on.
func (s *Service) ImageStatus(ctx context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	return s.next.ImageStatus(forward(ctx), r)
}

// RemoveImage passes the call on.
func (s *Service) RemoveImage(ctx context.Context, r *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	return s.next.RemoveImage(forward(ctx), r)
}

// ImageFsInfo passes the call on.
func (s *Service) ImageFsInfo(ctx context.Context, r *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	return s.next.ImageFsInfo(forward(ctx), r)
}

// StreamImages passes the call on, message by message.
func (s *Service) StreamImages(r *cri.StreamImagesRequest, out grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	in, err := s.next.StreamImages(forward(out.Context()), r)
	if err != nil {
		return err
	}
	for {
		m, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := out.Send(m); err != nil {
			return err
		}
	}
}
