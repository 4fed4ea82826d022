package profiles_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/profiles"
	"github.com/hearth-serverless/hearth/prefetch"
)

// engine starts images, which listen at an address.
type engine struct {
	address string
	err     error
	tried   []*hearthv1.Revision
}

var appChain = digest.FromString("chain")

func (e *engine) Try(ctx context.Context, what *hearthv1.Revision, served func(context.Context, string) error) (time.Duration, error) {
	e.tried = append(e.tried, what)
	if e.err != nil {
		return 0, e.err
	}
	return time.Second, served(ctx, e.address)
}

func (e *engine) Pull(ctx context.Context, ref string) (digest.Digest, error) {
	return e.Lookup(ctx, ref)
}

func (e *engine) Lookup(_ context.Context, ref string) (digest.Digest, error) {
	if ref != "reg.example/app:1" {
		return "", fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
	}
	return appChain, nil
}

func (e *engine) Named(chain digest.Digest) (string, digest.Digest, bool) {
	if chain != appChain {
		return "", "", false
	}
	return "reg.example/app:1", "", true
}

// knowing learns at once.
type knowing struct {
	encoded   []byte
	off, lost error
	recorded  int
}

func (k *knowing) Profile(digest.Digest) ([]byte, bool) { return k.encoded, k.encoded != nil }

func (k *knowing) Record(digest.Digest) (<-chan error, error) {
	if k.off != nil {
		return nil, k.off
	}
	k.recorded++
	learnt := make(chan error, 1)
	learnt <- k.lost
	return learnt, nil
}

func (k *knowing) Kept() int64 { return 5 }

func (k *knowing) Usage() []prefetch.Usage {
	return []prefetch.Usage{{Image: appChain, Starts: 3, Hits: 1, Ahead: 10, Used: 8, InVain: 2}, {Image: "sha256:gone"}}
}

// serve has a Service answer over HTTP.
func serve(t *testing.T, e *engine, k *knowing) hearthv1connect.ProfileServiceClient {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewProfileServiceHandler(profiles.Service{Node: e, Known: k}))
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return hearthv1connect.NewProfileServiceClient(server.Client(), server.URL)
}

// profile makes one, and gives what was said.
func profile(t *testing.T, c hearthv1connect.ProfileServiceClient, req *hearthv1.ProfileImageRequest) (said []*hearthv1.ProfileImageResponse, err error) {
	t.Helper()
	stream, err := c.ProfileImage(t.Context(), connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() {
		said = append(said, stream.Msg())
	}
	return said, stream.Err()
}

func TestProfileImage(t *testing.T) {
	answers := 0
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if answers++; answers == 1 || r.URL.Path != "/ready" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer app.Close()
	e, k := &engine{address: strings.TrimPrefix(app.URL, "http://")}, &knowing{encoded: []byte("learnt")}
	c := serve(t, e, k)
	said, err := profile(t, c, &hearthv1.ProfileImageRequest{Image: "reg.example/app:1", RequestPath: "/ready", Env: map[string]string{"A": "b"}})
	if err != nil || len(said) != 5 || said[3].GetStart() != 3 || said[3].GetReadyTime().AsDuration() != time.Second {
		t.Fatalf("said %v, error %v", said, err)
	}
	p := said[4].GetProfile()
	if p.GetImage() != "reg.example/app:1" || p.GetChainId() != appChain.String() || string(p.GetEncoded()) != "learnt" || k.recorded != 3 || answers != 4 {
		t.Errorf("profile %v after %d recordings and %d requests", p, k.recorded, answers)
	}
	if what := e.tried[0]; what.GetPort() != 8080 || what.GetEnv()["A"] != "b" {
		t.Errorf("tried %v", what)
	}
	answer, err := c.GetProfile(t.Context(), connect.NewRequest(&hearthv1.GetProfileRequest{Image: "reg.example/app:1"}))
	if err != nil || string(answer.Msg.GetProfile().GetEncoded()) != "learnt" {
		t.Errorf("known is %v, error %v", answer, err)
	}
	usage, err := c.GetCacheUsage(t.Context(), connect.NewRequest(&hearthv1.GetCacheUsageRequest{}))
	if err != nil || len(usage.Msg.GetImages()) != 2 || usage.Msg.GetKeptBytes() != 5 {
		t.Fatalf("usage %v, error %v", usage, err)
	}
	if u := usage.Msg.GetImages()[0]; u.GetImage() != "reg.example/app:1" || u.GetAheadBytes() != 10 || u.GetVainBytes() != 2 {
		t.Errorf("usage %v", u)
	}
	if u := usage.Msg.GetImages()[1]; u.GetImage() != "" || u.GetChainId() != "sha256:gone" {
		t.Errorf("usage %v", u)
	}
}

func TestProfileImageFails(t *testing.T) {
	good := &hearthv1.ProfileImageRequest{Image: "reg.example/app:1", Starts: 2}
	tests := map[string]struct {
		req  *hearthv1.ProfileImageRequest
		e    engine
		k    knowing
		code connect.Code
		says string
	}{
		"too many starts": {&hearthv1.ProfileImageRequest{Starts: 21}, engine{}, knowing{}, connect.CodeInvalidArgument, "at most 20"},
		"no port":         {&hearthv1.ProfileImageRequest{Port: 70000}, engine{}, knowing{}, connect.CodeInvalidArgument, "port 70000"},
		"no path":         {&hearthv1.ProfileImageRequest{RequestPath: "x"}, engine{}, knowing{}, connect.CodeInvalidArgument, "does not begin with /"},
		"no image":        {&hearthv1.ProfileImageRequest{Image: "absent"}, engine{}, knowing{}, connect.CodeNotFound, "absent"},
		"nothing learnt":  {good, engine{}, knowing{off: errors.New("no BPF")}, connect.CodeFailedPrecondition, "learns nothing: no BPF"},
		"recording lost":  {good, engine{}, knowing{lost: errors.New("disk full")}, connect.CodeInternal, "start 1 of image reg.example/app:1: disk full"},
		"start fails":     {good, engine{err: errors.New("no such program")}, knowing{}, connect.CodeInternal, "no such program"},
		"kubelet's node":  {good, engine{err: errdefs.ErrFailedPrecondition}, knowing{}, connect.CodeFailedPrecondition, "start 1"},
		"nothing known":   {good, engine{}, knowing{}, connect.CodeNotFound, "knows nothing"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := profile(t, serve(t, &tt.e, &tt.k), tt.req)
			if connect.CodeOf(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.says) {
				t.Errorf("error %v", err)
			}
		})
	}
	_, err := serve(t, &engine{}, &knowing{}).GetProfile(t.Context(), connect.NewRequest(&hearthv1.GetProfileRequest{Image: "absent"}))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("error %v", err)
	}
}
