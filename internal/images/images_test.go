package images_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/images"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// fake is containerd and the snapshotter: a pull goes on until it is told to end.
type fake struct {
	cri.UnimplementedImageServiceServer
	end   chan error
	asked chan *cri.PullImageRequest

	mu   sync.Mutex // guards pull
	pull snapshotter.Pull
}

func (f *fake) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	f.asked <- r
	select {
	case err := <-f.end:
		return &cri.PullImageResponse{ImageRef: "sha256:1d"}, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *fake) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	return &cri.ListImagesResponse{Images: []*cri.Image{
		{Id: "a", RepoTags: []string{"reg/a:1"}, RepoDigests: []string{"reg/a@x"}, Size: 7, Pinned: true},
		{Id: "b", RepoDigests: []string{"reg/b@y"}},
	}}, nil
}

func (f *fake) set(p snapshotter.Pull) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pull = p
}

func (f *fake) progress(ref string) (snapshotter.Pull, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pull, ref == f.pull.Image
}

func start(t *testing.T) (*fake, hearthv1connect.ImageServiceClient) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "c")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{end: make(chan error, 1), asked: make(chan *cri.PullImageRequest, 4)}
	server := grpc.NewServer()
	cri.RegisterImageServiceServer(server, f)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	s, err := images.New(images.Config{
		Containerd: socket, Progress: f.progress,
		Credentials: func(_ context.Context, ref string) (string, string, error) { return "", "token of " + ref, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewImageServiceHandler(s))
	web := httptest.NewServer(mux)
	t.Cleanup(web.Close)
	return f, hearthv1connect.NewImageServiceClient(web.Client(), web.URL)
}

func TestPullTellsHowFarItIs(t *testing.T) {
	f, c := start(t)
	f.set(snapshotter.Pull{Image: "docker.io/library/app:latest", Ended: true, Layers: []snapshotter.LayerProgress{{Bytes: 99}}}) // of long ago
	stream, err := c.PullImage(t.Context(), connect.NewRequest(&hearthv1.PullImageRequest{Image: "app"}))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || len(stream.Msg().GetLayers()) > 0 {
		t.Errorf("begins with %v, %v", stream.Msg(), stream.Err())
	}
	if r := <-f.asked; r.GetImage().GetImage() != "docker.io/library/app:latest" || r.GetAuth().GetIdentityToken() != "token of docker.io/library/app:latest" {
		t.Errorf("asked for %v", r)
	}
	layers := []snapshotter.LayerProgress{
		{Digest: "sha256:a", Bytes: 10, State: snapshotter.LayerPresent},
		{Digest: "sha256:b", Bytes: 20, Fetched: 5, State: snapshotter.LayerFetching},
	}
	f.set(snapshotter.Pull{Image: "docker.io/library/app:latest", Begun: time.Now(), Layers: layers})
	want := &hearthv1.PullImageResponse{BytesTotal: 20, BytesFetched: 5, Layers: []*hearthv1.LayerProgress{
		{Digest: "sha256:a", Bytes: 10, State: hearthv1.LayerState_LAYER_STATE_PRESENT},
		{Digest: "sha256:b", Bytes: 20, BytesFetched: 5, State: hearthv1.LayerState_LAYER_STATE_FETCHING},
	}}
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	if diff := cmp.Diff(want, stream.Msg(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	f.end <- nil
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	want.Id = "sha256:1d"
	if diff := cmp.Diff(want, stream.Msg(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if stream.Receive() || stream.Err() != nil {
		t.Errorf("goes on with %v, %v", stream.Msg(), stream.Err())
	}
}

func TestPullErrors(t *testing.T) {
	f, c := start(t)
	for name, x := range map[string]struct {
		image string
		err   error
		want  connect.Code
	}{
		"no reference":   {"Not A Reference", nil, connect.CodeInvalidArgument},
		"not found":      {"app", status.Error(codes.NotFound, "no such tag"), connect.CodeNotFound},
		"disk full":      {"app", status.Error(codes.ResourceExhausted, "the disk of /x is full"), connect.CodeResourceExhausted},
		"not authorised": {"app", status.Error(codes.Unauthenticated, "401"), connect.CodeUnauthenticated},
		"something else": {"app", status.Error(codes.Unknown, "no"), connect.CodeInternal},
	} {
		if x.err != nil {
			f.end <- x.err
		}
		stream, err := c.PullImage(t.Context(), connect.NewRequest(&hearthv1.PullImageRequest{Image: x.image}))
		if err != nil {
			t.Fatal(err)
		}
		for stream.Receive() {
		}
		if got := connect.CodeOf(stream.Err()); got != x.want || x.err != nil && !strings.Contains(stream.Err().Error(), status.Convert(x.err).Message()) {
			t.Errorf("%s: %v, want %v", name, stream.Err(), x.want)
		}
	}
}

func TestList(t *testing.T) {
	_, c := start(t)
	got, err := c.ListImages(t.Context(), connect.NewRequest(&hearthv1.ListImagesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	want := &hearthv1.ListImagesResponse{Images: []*hearthv1.Image{{Id: "a", Names: []string{"reg/a:1"}, Bytes: 7, Pinned: true}, {Id: "b", Names: []string{"reg/b@y"}}}}
	if diff := cmp.Diff(want, got.Msg, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}
