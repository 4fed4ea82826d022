package node_test

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/internal/keychain"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// onlyFor makes a registry private.
func onlyFor(user, password string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		u, p, ok := r.BasicAuth()
		if ok && u == user && p == password {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
}

// A kubelet's pull secret, which is in PullImage and nowhere else, serves the snapshotter too if the kubelet talks through the keychain.
func TestPullSecrets(t *testing.T) {
	none := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(none, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	var service atomic.Pointer[keychain.Service]
	bothPaths(t, func(t *testing.T, n *pullNode) {
		s, err := keychain.New(n.Socket, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		service.Store(s)
		kubelet := throughKeychain(t, n, s)
		img := imageOf(t, gzipped, tarball(t, fileEntry("secret", "s"+t.Name())), tarball(t, fileEntry("other", t.Name())))
		ref := n.registry.push(t, "team/private:1", img)
		guard := onlyFor("me", "pass")
		n.registry.fault.Store(&guard)
		for _, wrong := range []*cri.AuthConfig{nil, {Username: "me", Password: "wrong"}} {
			if _, err := kubelet.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: wrong}); err == nil {
				t.Error("a private image was pulled with", wrong)
			}
		}
		if _, err := kubelet.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: &cri.AuthConfig{Username: "me", Password: "pass"}}); err != nil {
			t.Fatal(err)
		}
		if present := n.blobsPresent(t, img); present != 0 {
			t.Errorf("%d blobs in the content store: it fell back", present)
		}
		if list, err := kubelet.ListImages(t.Context(), &cri.ListImagesRequest{}); err != nil || len(list.GetImages()) == 0 {
			t.Errorf("images %v, %v", list, err)
		}
		if info, err := kubelet.ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{}); err != nil || len(info.GetImageFilesystems()) == 0 {
			t.Errorf("file systems %v, %v", info, err)
		}
	}, func(c *registry.Config, _ *snapshotter.Config) {
		c.DockerConfig = none
		c.Keychain = func(ctx context.Context, ref, host string) (string, string, error) {
			return service.Load().Credentials(ctx, ref, host)
		}
	})
}

// throughKeychain serves the keychain before n's containerd, and returns a client of it.
func throughKeychain(t *testing.T, n *pullNode, service *keychain.Service) cri.ImageServiceClient {
	t.Helper()
	socket := filepath.Join(n.Dir, "k.sock")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Serve(ctx, socket, nil) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return cri.NewImageServiceClient(conn)
}

// containerd cancels a pull of which it sees no progress, and it sees nothing of ours. It must not count us: it looks at its own
// requests only, and while it waits for a snapshot it has none.
func TestSlowPullIsProgress(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *pullNode) {
		n.kill(t)
		config := filepath.Join(n.Dir, "config.toml")
		text, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		const timeout = 2 * time.Second
		short := strings.Replace(string(text), "  disable_snapshot_annotations", "  image_pull_progress_timeout = '"+timeout.String()+"'\n  disable_snapshot_annotations", 1)
		if err := os.WriteFile(config, []byte(short), 0o600); err != nil {
			t.Fatal(err)
		}
		n.start(t)
		img := imageOf(t, gzipped, tarball(t, fileEntry("a", t.Name())), tarball(t, fileEntry("b", t.Name())))
		ref := n.registry.push(t, "slow:1", img)
		slow := func(_ http.ResponseWriter, r *http.Request) bool {
			if r.UserAgent() == "hearth" && strings.HasSuffix(r.URL.Path, layerDigests(t, img)[0].String()) {
				time.Sleep(2*timeout + timeout/2)
			}
			return false
		}
		n.registry.fault.Store(&slow)
		begun := time.Now()
		if err := n.pull(t, ref, nil); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took < 2*timeout {
			t.Errorf("took %v: nothing was slow", took)
		}
		if present := n.blobsPresent(t, img); present != 0 {
			t.Errorf("%d blobs in the content store: it fell back", present)
		}
	})
}
