package cli_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/cli"
	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/registry"
)

func (f *fake) ProfileImage(_ context.Context, r *connect.Request[hearthv1.ProfileImageRequest], out *connect.ServerStream[hearthv1.ProfileImageResponse]) error {
	f.profiled = r.Msg
	if f.profile == nil {
		return connect.NewError(connect.CodeFailedPrecondition, errors.New("this node learns nothing: no BPF"))
	}
	for n := range r.Msg.GetStarts() {
		if err := out.Send(&hearthv1.ProfileImageResponse{Start: n + 1, ReadyTime: durationpb.New(250 * time.Millisecond)}); err != nil {
			return err
		}
	}
	return out.Send(&hearthv1.ProfileImageResponse{Profile: f.profile})
}

func (f *fake) GetProfile(context.Context, *connect.Request[hearthv1.GetProfileRequest]) (*connect.Response[hearthv1.GetProfileResponse], error) {
	if f.profile == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("the node knows nothing of what starts of it read"))
	}
	return connect.NewResponse(&hearthv1.GetProfileResponse{Profile: f.profile}), nil
}

func (f *fake) GetCacheUsage(context.Context, *connect.Request[hearthv1.GetCacheUsageRequest]) (*connect.Response[hearthv1.GetCacheUsageResponse], error) {
	return connect.NewResponse(&hearthv1.GetCacheUsageResponse{Images: []*hearthv1.CacheUsage{
		{Image: "reg/hello:1", ChainId: "sha256:0123456789abcdef", Starts: 4, HitBytes: 2e6, AheadBytes: 12e6, UsedBytes: 9e6, VainBytes: 1e6, Time: durationpb.New(42 * time.Millisecond)},
		{ChainId: "sha256:fedcba9876543210"},
	}, KeptBytes: 5e5}), nil
}

// imageOf is what a reference names.
func imageOf(t *testing.T, ref string) *registry.Image {
	t.Helper()
	c, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	img, err := c.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// learnt is a profile of an image's lowest layer and of one that it has not.
func learnt(t *testing.T, img *registry.Image) *hearthv1.ImageProfile {
	t.Helper()
	other := img.Digest // some digest
	p := &prefetch.Profile{Starts: 3, Weight: 2, Lost: 7, Files: []prefetch.File{
		{Layer: other, Path: "gone", Ranges: []prefetch.Range{{Offset: 4096, Length: 4096, Order: 0, Seen: 1}}},
		{Layer: img.Layers[0].DiffID, Path: "usr/bin/app", Ranges: []prefetch.Range{
			{Offset: 0, Length: 8192, Order: 1, Seen: 2}, {Offset: 65536, Length: 1 << 20, Order: 3, Seen: 1, AfterReady: true},
		}},
	}}
	encoded, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return &hearthv1.ImageProfile{Image: img.Ref, ChainId: img.ChainID().String(), Encoded: encoded}
}

func TestProfile(t *testing.T) {
	f := newFake(t)
	ref := imageRegistry(t)
	img := imageOf(t, ref)
	f.want(t, 1, "has no profile in its registry; `hearth image profile "+ref, "image", "show-profile", ref)
	f.want(t, 4, "start a function of it here", "image", "show-profile", ref, "--node")
	f.want(t, 1, "no BPF; nodeagent's log says", "image", "profile", ref)
	f.want(t, 2, "one at least", "image", "profile", ref, "--starts", "0")
	f.profile = learnt(t, img)
	f.want(t, 0, "it stays on this node", "image", "profile", ref, "--no-push", "--starts", "2", "--request", "/ready", "-e", "A=b")
	want := "image:\"" + ref + "\" starts:2 port:8080 request_path:\"/ready\" env:{key:\"A\" value:\"b\"}"
	if got := strings.ReplaceAll(f.profiled.String(), "  ", " "); got != want {
		t.Errorf("asks for %s, want %s", got, want)
	}
	f.want(t, 1, "has no profile in its registry", "image", "show-profile", ref)
	f.want(t, 0, "starts read 1.1 MB of 2 files, 7 events lost (3 starts recorded); pushed beside the image", "image", "profile", ref)
	code, out, errs := f.exec(t, "", "image", "profile", ref, "-o", "json")
	var made struct {
		Ready  []float64 `json:"ready_seconds"`
		Digest string
		Pushed bool
		Starts int
	}
	if err := json.Unmarshal([]byte(out), &made); err != nil || code != 0 || !made.Pushed || made.Starts != 3 || len(made.Ready) != 3 || made.Digest != img.Digest.String() {
		t.Errorf("exit code %d, %v: %s %s", code, err, out, errs)
	}
	if !strings.Contains(errs, "start 2 of 3: ready after 250ms") {
		t.Errorf("progress is %s", errs)
	}
	f.profile.ChainId = "sha256:other"
	f.want(t, 1, "names another image in the registry", "image", "profile", ref)
}

const shownProfile = `3 starts recorded, 7 events lost
1.1 MB are read of an image of SIZE, compressed

layer DIFFID: 8.2 kB before ready, 1.0 MB after
FILE           RANGES   BEFORE READY   AFTER    SEEN
/usr/bin/app   2        8.2 kB         1.0 MB   100 %

layer OTHER (not of this image): 4.1 kB before ready, - after
FILE    RANGES   BEFORE READY   AFTER   SEEN
/gone   1        4.1 kB         -       50 %
`

func TestShowProfile(t *testing.T) {
	f := newFake(t)
	ref := imageRegistry(t)
	img := imageOf(t, ref)
	f.profile = learnt(t, img)
	f.want(t, 0, "pushed", "image", "profile", ref)
	for _, from := range []string{"registry", "node"} {
		args := []string{"image", "show-profile", ref}
		if from == "node" {
			args = append(args, "--node")
		}
		code, out, errs := f.exec(t, "", args...)
		head, rest, _ := strings.Cut(out, "\n")
		if code != 0 || !strings.HasPrefix(head, ref+", from the "+from) || strings.Contains(head, "made on build, ") != (from == "registry") {
			t.Errorf("exit code %d: %s%s", code, head, errs)
		}
		size := fmt.Sprintf("%.1f kB", float64(2*img.Layers[0].Size+img.Layers[1].Size)/1e3)
		rest = strings.NewReplacer(size, "SIZE", img.Layers[0].DiffID.String(), "DIFFID", img.Digest.String(), "OTHER").Replace(rest)
		if diff := cmp.Diff(shownProfile, rest); diff != "" {
			t.Error(diff)
		}
		code, out, _ = f.exec(t, "", append(args, "-o", "json")...)
		var shown struct {
			From       string
			Starts     int
			LostEvents int   `json:"lost_events"`
			ImageBytes int64 `json:"image_bytes"`
			Layers     []struct {
				Foreign bool
				Files   []struct {
					Path   string
					Ranges []struct{ Offset, Length int64 }
				}
			}
		}
		err := json.Unmarshal([]byte(out), &shown)
		if err != nil || code != 0 || shown.From != from || shown.LostEvents != 7 || len(shown.Layers) != 2 || len(shown.Layers[0].Files[0].Ranges) != 2 || !shown.Layers[1].Foreign {
			t.Errorf("exit code %d, %v: %s", code, err, out)
		}
	}
}

const shownCache = `IMAGE                 STARTS   HITS     READ AHEAD   USED     IN VAIN   TIME
reg/hello:1           4        2.0 MB   12.0 MB      9.0 MB   1.0 MB    42ms
sha256:fedcba987654   0        -        -            -        -         0s

500.0 kB kept in memory, because several images need them
`

func TestNodeCache(t *testing.T) {
	f := newFake(t)
	code, out, errs := f.exec(t, "", "node", "cache")
	if diff := cmp.Diff(shownCache, out); code != 0 || diff != "" {
		t.Errorf("exit code %d: %s %s", code, errs, diff)
	}
	f.want(t, 0, `"aheadBytes": "12000000"`, "node", "cache", "-o", "json")
	f.want(t, 3, "show the node's cache", "node", "cache", "--node-socket", "/tmp/nobody.sock")
	var errOut strings.Builder
	if code := cli.Exec(t.Context(), []string{"node", "cache", "--kubeconfig", "/none"}, nil, io.Discard, &errOut); code != 2 || !strings.Contains(errOut.String(), "run it on the node itself") {
		t.Errorf("exit code %d: %s", code, errOut.String())
	}
}
