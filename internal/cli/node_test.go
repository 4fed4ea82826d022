package cli_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
