package cripull_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/internal/cripull"
)

// containerd is a fake that notes what happens in which order.
type containerd struct {
	cri.ImageServiceClient
	err   error
	asked *cri.PullImageRequest
	order []string
}

func (c *containerd) PullImage(_ context.Context, r *cri.PullImageRequest, _ ...grpc.CallOption) (*cri.PullImageResponse, error) {
	c.asked, c.order = r, append(c.order, "pull")
	return &cri.PullImageResponse{ImageRef: "sha256:1d"}, c.err
}

func TestPull(t *testing.T) {
	errWrong := errors.New("wrong")
	tests := map[string]struct {
		user, secret string
		auth         *cri.AuthConfig
		credentials  error // of finding them
		fetch, pull  error
		want         error
	}{
		"nothing to tell":     {},
		"password":            {user: "me", secret: "word", auth: &cri.AuthConfig{Username: "me", Password: "word"}},
		"empty password":      {user: "me", auth: &cri.AuthConfig{Username: "me"}},
		"identity token":      {secret: "token", auth: &cri.AuthConfig{IdentityToken: "token"}},
		"no credentials":      {credentials: errWrong, want: errWrong},
		"fetched in vain":     {fetch: errWrong},
		"containerd has none": {pull: status.Error(codes.NotFound, "no such image"), want: errdefs.ErrNotFound},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := &containerd{err: tt.pull}
			id, err := cripull.Puller{
				Images: c,
				Credentials: func(_ context.Context, ref string) (string, string, error) {
					return tt.user, tt.secret, tt.credentials
				},
				Fetch: func(_ context.Context, ref string) error {
					c.order = append(c.order, "fetch "+ref)
					return tt.fetch
				},
			}.Pull(t.Context(), "reg/app:1")
			if !errors.Is(err, tt.want) || (err == nil) != (id == "sha256:1d") {
				t.Fatalf("id %q, error %v", id, err)
			}
			if tt.credentials != nil {
				if c.order != nil {
					t.Errorf("%q without credentials", c.order)
				}
				return
			}
			want := &cri.PullImageRequest{
				Image:         &cri.ImageSpec{Image: "reg/app:1", RuntimeHandler: cripull.Handler},
				SandboxConfig: &cri.PodSandboxConfig{Annotations: map[string]string{"io.containerd.cri.runtime-handler": cripull.Handler}},
				Auth:          tt.auth,
			}
			if diff := cmp.Diff(want, c.asked, protocmp.Transform()); diff != "" || !slices.Equal(c.order, []string{"fetch reg/app:1", "pull"}) {
				t.Errorf("in the order %q: %s", c.order, diff)
			}
		})
	}
	if id, err := (cripull.Puller{Images: &containerd{}}).Pull(t.Context(), "reg/app:1"); err != nil || id == "" {
		t.Errorf("with nothing but containerd: id %q, error %v", id, err)
	}
}
