package keychain_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/internal/keychain"
)

// fakeCRI is containerd: it says what it was asked, and during a pull what the keychain knows.
type fakeCRI struct {
	cri.UnimplementedImageServiceServer
	keychain func(ref, host string) string
	during   []string
	fetched  []string // images that were fetched before, with whoever asked for them by then
	fail     error
	seen     metadata.MD
}

func (f *fakeCRI) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	f.seen, _ = metadata.FromIncomingContext(ctx)
	f.during = append(f.during, f.keychain(r.GetImage().GetImage(), "reg.example"))
	return &cri.PullImageResponse{ImageRef: "id of " + r.GetImage().GetImage()}, f.fail
}

func (f *fakeCRI) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	return &cri.ListImagesResponse{Images: []*cri.Image{{Id: "listed"}}}, nil
}

func (f *fakeCRI) ImageStatus(_ context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	return &cri.ImageStatusResponse{Info: map[string]string{"of": r.GetImage().GetImage()}}, nil
}

func (f *fakeCRI) RemoveImage(context.Context, *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	return nil, status.Error(codes.FailedPrecondition, "in use")
}

func (f *fakeCRI) ImageFsInfo(context.Context, *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	return &cri.ImageFsInfoResponse{ImageFilesystems: []*cri.FilesystemUsage{{Timestamp: 7}}}, nil
}

func (f *fakeCRI) StreamImages(_ *cri.StreamImagesRequest, out grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	for i := range 3 {
		if err := out.Send(&cri.StreamImagesResponse{Images: []*cri.Image{{Id: fmt.Sprint(i)}}}); err != nil {
			return err
		}
	}
	return status.Error(codes.Aborted, "enough")
}

// serve runs a server until the test ends.
func serve(t *testing.T, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// start puts a Service between the returned client and a fake.
func start(t *testing.T) (*fakeCRI, *keychain.Service, cri.ImageServiceClient) {
	t.Helper()
	dir := t.TempDir()
	s, err := keychain.New(filepath.Join(dir, "c"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeCRI{keychain: func(ref, host string) string {
		user, secret, err := s.Credentials(t.Context(), ref, host)
		if err != nil {
			t.Error(err)
		}
		return user + ":" + secret
	}}
	server := grpc.NewServer()
	cri.RegisterImageServiceServer(server, f)
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(dir, "c"))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, server.Stop)()
		if err := server.Serve(l); ctx.Err() == nil { // it may be stopped before it serves
			return err
		}
		return nil
	})
	serve(t, func(ctx context.Context) error {
		return s.Serve(ctx, filepath.Join(dir, "k"), func(_ context.Context, ref string) error {
			f.fetched = append(f.fetched, ref+" "+f.keychain(ref, "reg.example"))
			return errors.New("the pull has to do it")
		})
	})
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "k"), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return f, s, cri.NewImageServiceClient(conn)
}

func request(ref string, auth *cri.AuthConfig) *cri.PullImageRequest {
	return &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: auth}
}

func TestPassesOn(t *testing.T) {
	_, _, c := start(t)
	if r, err := c.ListImages(t.Context(), &cri.ListImagesRequest{}); err != nil || r.GetImages()[0].GetId() != "listed" {
		t.Error(r, err)
	}
	if r, err := c.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: "x"}}); err != nil || r.GetInfo()["of"] != "x" {
		t.Error(r, err)
	}
	if _, err := c.RemoveImage(t.Context(), &cri.RemoveImageRequest{}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "in use") {
		t.Error(err)
	}
	if r, err := c.ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{}); err != nil || r.GetImageFilesystems()[0].GetTimestamp() != 7 {
		t.Error(r, err)
	}
	stream, err := c.StreamImages(t.Context(), &cri.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; err == nil; n++ {
		_, err = stream.Recv()
	}
	if n != 4 || status.Code(err) != codes.Aborted {
		t.Errorf("%d messages, %v", n-1, err)
	}
}

func TestCredentialsReachTheSnapshotter(t *testing.T) {
	plain := &cri.AuthConfig{Username: "me", Password: "pass"}
	for name, c := range map[string]struct {
		auth *cri.AuthConfig
		want string // for reg.example
	}{
		"none":           {nil, ":"},
		"password":       {plain, "me:pass"},
		"identity token": {&cri.AuthConfig{IdentityToken: "tok"}, ":tok"},
		"auth":           {&cri.AuthConfig{Auth: base64.StdEncoding.EncodeToString([]byte("u:p:q\x00"))}, "u:p:q"},
		"not base64":     {&cri.AuthConfig{Auth: "!"}, ":"},
		"no colon":       {&cri.AuthConfig{Auth: "YWJj"}, ":"},
		"this server":    {&cri.AuthConfig{Username: "me", Password: "p", ServerAddress: "https://reg.example/v1/"}, "me:p"},
		"other server":   {&cri.AuthConfig{Username: "me", Password: "p", ServerAddress: "https://other.example"}, ":"},
		"no server":      {&cri.AuthConfig{Username: "me", Password: "p", ServerAddress: "reg.example"}, ":"},
		"broken server":  {&cri.AuthConfig{Username: "me", Password: "p", ServerAddress: ":"}, ":"},
		"empty":          {&cri.AuthConfig{}, ":"},
	} {
		f, s, client := start(t)
		ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "t")
		r, err := client.PullImage(ctx, request("reg.example/team/app:1", c.auth))
		if err != nil || r.GetImageRef() != "id of reg.example/team/app:1" || f.during[0] != c.want {
			t.Errorf("%s: %v %v, during the pull %q, want %q", name, r, err, f.during, c.want)
		}
		if len(f.fetched) != 1 || f.fetched[0] != "reg.example/team/app:1 "+c.want {
			t.Errorf("%s: fetched before: %q", name, f.fetched)
		}
		if v := f.seen.Get("traceparent"); len(v) != 1 || v[0] != "t" {
			t.Errorf("%s: metadata %v", name, f.seen)
		}
		// Afterwards the repository has them, whatever the tag; others do not.
		for ref, want := range map[string]string{"reg.example/team/app": c.want, "reg.example/team/app@sha256:" + strings.Repeat("a", 64): c.want, "reg.example/team/other": ":", "other.example/team/app": ":"} {
			if user, secret, err := s.Credentials(t.Context(), ref, "reg.example"); err != nil || user+":"+secret != want {
				t.Errorf("%s: %s has %s:%s %v, want %s", name, ref, user, secret, err, want)
			}
		}
	}
	_, s, _ := start(t)
	if _, _, err := s.Credentials(t.Context(), "Not A Reference", ""); err == nil {
		t.Error("takes what is no reference")
	}
}

// Kubelet tries one secret after the other: what was refused is forgotten at once, what served is forgotten in time.
func TestForgets(t *testing.T) {
	f, s, client := start(t)
	f.fail = status.Error(codes.Unknown, "401")
	if _, err := client.PullImage(t.Context(), request("reg.example/a", &cri.AuthConfig{Username: "wrong", Password: "p"})); err == nil {
		t.Fatal("no error")
	}
	if got := f.keychain("reg.example/a", ""); got != ":" {
		t.Errorf("keeps %s", got)
	}
	f.fail = nil
	for _, user := range []string{"old", "new"} {
		if _, err := client.PullImage(t.Context(), request("reg.example/a", &cri.AuthConfig{Username: user, Password: "p"})); err != nil {
			t.Fatal(err)
		}
	}
	if got := f.keychain("reg.example/a", ""); got != "new:p" || s.Held() != 1 {
		t.Errorf("%s, %d held", got, s.Held())
	}
	synctest.Test(t, func(t *testing.T) {
		b := keychain.NewBook()
		b.Pull("reg.example/a", "me")(true)
		time.Sleep(9 * time.Minute)
		if b.Find("reg.example/a") != "me" {
			t.Error("forgotten too soon")
		}
		done := b.Pull("reg.example/long", "slow")
		time.Sleep(time.Hour)
		if b.Find("reg.example/a") != "" {
			t.Error("not forgotten")
		}
		if b.Find("reg.example/long") != "slow" {
			t.Error("forgotten while the pull is under way")
		}
		done(true)
		for i := range 1000 {
			b.Pull(fmt.Sprintf("reg.example/%d", i), "x")
		}
		if n := b.Held(); n > 512 {
			t.Errorf("%d held", n)
		}
	})
}

func FuzzAuth(f *testing.F) {
	f.Add("reg.example/a:1", "u", "p", "YWJjOmQ=", "t", "https://reg.example")
	f.Add("", "", "", "!", "", ":")
	f.Fuzz(func(t *testing.T, ref, user, password, auth, token, server string) {
		a := &cri.AuthConfig{Username: user, Password: password, Auth: auth, IdentityToken: token, ServerAddress: server}
		if err := keychain.Check(ref, a); err != nil {
			for _, secret := range []string{password, auth, token} {
				if len(secret) > 8 && !strings.Contains(ref, secret) && strings.Contains(err.Error(), secret) {
					t.Errorf("%v tells a secret", err)
				}
			}
		}
	})
}
