package cli_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/cli"
)

func TestDoctor(t *testing.T) {
	const bad = "version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n"
	exec := func(in string, args ...string) (int, string, string) {
		var out, errs strings.Builder
		code := cli.Exec(t.Context(), append([]string{"node", "doctor"}, args...), strings.NewReader(in), &out, &errs)
		return code, out.String(), errs.String()
	}
	code, out, errs := exec(bad, "--config", "-")
	if code != 1 || !strings.Contains(out, "in -: [plugins.'io.containerd.cri.v1.images'] snapshotter = 'hearth'") || !strings.Contains(errs, "has problems") {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	code, out, _ = exec(bad, "--config", "-", "-o", "json")
	var findings []struct {
		Check, Status string
		Fix           struct{ File, Table, Line string }
	}
	if err := json.Unmarshal([]byte(out), &findings); err != nil || code != 1 || len(findings) < 5 {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
	const good = bad + `
[proxy_plugins.overlayfs]
type = 'snapshot'
address = '/run/s.sock'
exports = {root = '/r', enable_remote_snapshot_annotations = 'true'}
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
platform = 'linux'
snapshotter = 'overlayfs'
differ = 'walking'
`
	if code, out, errs = exec(good, "--config", "-", "--snapshotter", "overlayfs"); code != 0 {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out, errs = exec("", "--config", path, "--kubelet-config", "", "--run", filepath.Dir(path)); code != 1 || !strings.Contains(out, "kernel.overlayfs") || !strings.Contains(out, path) {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	if code, _, errs = exec("", "--config", path+".missing"); code != 1 || !strings.Contains(errs, "--config") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if code, _, errs = exec("", "extra"); code != 2 {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

func TestImages(t *testing.T) {
	f := newFake(t)
	f.want(t, 0, "reg/hello:1: 20.0 MB fetched for 2 layers", "image", "pull", "reg/hello:1")
	if out := f.want(t, 0, "", "image", "pull", "reg/hello:1"); out != "sha256:1d\n" {
		t.Errorf("prints %q", out)
	}
	out := f.want(t, 0, "", "image", "pull", "reg/hello:1", "-o", "json")
	events := strings.Split(strings.TrimSpace(out), "\n")
	if len(events) != 3 || !strings.Contains(events[1], `"bytesFetched":"5000000"`) || !strings.Contains(events[2], `"id":"sha256:1d"`) {
		t.Errorf("events %q", events)
	}
	f.want(t, 4, "no such image", "image", "pull", "reg/none")
	f.want(t, 2, "REF", "image", "pull")
	f.want(t, 0, "reg/hello:1   0123456789ab   7.0 MB       yes", "image", "ls")
	f.want(t, 0, `"id": "sha256:0123456789abcdef"`, "image", "ls", "-o", "json")
}

func TestBar(t *testing.T) {
	for want, m := range map[string]*hearthv1.PullImageResponse{
		"reading the manifest  2.0 s": {},
		"1 of 2 layers  ███████░░░░░░░░░░░░░░░░░░░░░░░  5.0 MB of 20.0 MB  2.5 MB/s  2.0 s": {BytesFetched: 5e6, BytesTotal: 20e6, Layers: []*hearthv1.LayerProgress{
			{State: hearthv1.LayerState_LAYER_STATE_PRESENT}, {State: hearthv1.LayerState_LAYER_STATE_FETCHING},
		}},
	} {
		if got := cli.PullBar(m, 2*time.Second); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
