package doctor_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"text/template"

	"github.com/hearth-serverless/hearth/deploy"
	"github.com/hearth-serverless/hearth/internal/doctor"
)

// good is a configuration without a fault, in each version.
var good = map[string]string{
	"2": `version = 2
[proxy_plugins.hearth]
  type = "snapshot"
  address = "/run/hearth/snapshotter.sock"
  [proxy_plugins.hearth.exports]
    root = "/var/lib/hearth/snapshotter"
    enable_remote_snapshot_annotations = "true"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "hearth"
  disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "hearth"
  differ = "walking"
`,
	"3": `version = 3
[proxy_plugins.hearth]
  type = "snapshot"
  address = "/run/hearth/snapshotter.sock"
  [proxy_plugins.hearth.exports]
    root = "/var/lib/hearth/snapshotter"
    enable_remote_snapshot_annotations = "true"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "hearth"
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = "/etc/containerd/certs.d"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = "hearth"
  differ = "walking"
`,
}

// version4 is version 3 but for the number: none of what is in it moved.
func version4() string { return strings.Replace(good["3"], "version = 3", "version = 4", 1) }

func TestGoodConfigurations(t *testing.T) {
	for name, text := range map[string]string{"2": good["2"], "3": good["3"], "4": version4()} {
		for _, f := range diagnose(t, text) {
			if f.Status != doctor.OK {
				t.Errorf("version %s: %+v", name, f)
			}
		}
	}
}

// What `hearth up` writes must please the doctor.
func TestOwnConfiguration(t *testing.T) {
	for _, local := range []bool{false, true} {
		tmpl := template.Must(template.New("").Funcs(template.FuncMap{"json": func(s any) string { return `"/some` + s.(string) + `"` }}).Parse(deploy.Containerd))
		values := map[string]any{"LocalPull": local, "DisableAppArmor": false}
		for _, name := range []string{
			"ContainerdRoot", "ContainerdState", "ContainerdSocket", "ContainerdTTRPC", "SnapshotterSocket", "SnapshotterRoot", "PauseRef",
			"HostsDir", "Platform", "Shim", "Runc", "RuncRoot", "CNIBin", "CNIConf", "OptDir", "ShimSockets",
		} {
			values[name] = "/" + name
		}
		var text bytes.Buffer
		if err := tmpl.Execute(&text, values); err != nil {
			t.Fatal(err)
		}
		for _, f := range diagnose(t, text.String()) {
			if f.Status != doctor.OK {
				t.Errorf("local pull %v: %+v", local, f)
			}
		}
	}
}

// Each line turns a good configuration into one with a trap: what it does, who must notice, and what to change.
func TestTraps(t *testing.T) {
	for _, c := range []struct {
		name, version, from, to string
		check                   string
		status                  doctor.Status
		table, line             string
	}{
		{"no proxy plugin", "3", "[proxy_plugins.hearth", "[proxy_plugins.other", "containerd.proxy_plugin", doctor.Problem, "[proxy_plugins.hearth]", "type = 'snapshot'"},
		{"proxy plugin of another kind", "3", `type = "snapshot"`, `type = "content"`, "containerd.proxy_plugin", doctor.Problem, "[proxy_plugins.hearth]", "type = 'snapshot'"},
		{"no address", "3", `address = "/run/hearth/snapshotter.sock"`, "", "containerd.proxy_plugin", doctor.Problem, "[proxy_plugins.hearth]", "address = "},
		{"relative address", "3", `"/run/hearth/snapshotter.sock"`, `"snapshotter.sock"`, "containerd.proxy_plugin", doctor.Problem, "[proxy_plugins.hearth]", "address = "},
		{"no root", "3", `root = "/var/lib/hearth/snapshotter"`, "", "containerd.exports_root", doctor.Warning, "[proxy_plugins.hearth.exports]", "root = "},
		{"annotations not exported", "3", `enable_remote_snapshot_annotations = "true"`, "", "containerd.annotations", doctor.Problem, "[proxy_plugins.hearth.exports]", "enable_remote_snapshot_annotations = 'true'"},
		{"annotations exported as a boolean", "3", `annotations = "true"`, "annotations = true", "containerd.annotations", doctor.Problem, "[proxy_plugins.hearth.exports]", "enable_remote_snapshot_annotations = 'true'"},
		{"rebase", "3", `type = "snapshot"`, "type = \"snapshot\"\ncapabilities = [\"rebase\"]", "containerd.rebase", doctor.Problem, "[proxy_plugins.hearth]", "capabilities"},
		{"CRI uses another", "3", `snapshotter = "hearth"` + "\n  [", `snapshotter = "overlayfs"` + "\n  [", "containerd.cri", doctor.Problem, "[plugins.'io.containerd.cri.v1.images']", "snapshotter = 'hearth'"},
		{"CRI uses another, version 2", "2", `snapshotter = "hearth"` + "\n  disable", `snapshotter = "overlayfs"` + "\n  disable", "containerd.cri", doctor.Problem, "[plugins.'io.containerd.grpc.v1.cri'.containerd]", "snapshotter = 'hearth'"},
		{"CRI disabled", "3", "version = 3", "version = 3\ndisabled_plugins = ['io.containerd.grpc.v1.cri']", "containerd.cri", doctor.Problem, "", "disabled_plugins"},
		{"runtime class", "3", "[[plugins", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\nsnapshotter = 'devmapper'\n[[plugins", "containerd.cri", doctor.Warning, "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]", "snapshotter = 'hearth'"},
		{"older path without annotations", "3", `snapshotter = "hearth"` + "\n  [", "snapshotter = 'hearth'\nuse_local_image_pull = true\n  [", "containerd.pull_path", doctor.Problem, "[plugins.'io.containerd.cri.v1.images']", "disable_snapshot_annotations = false"},
		{"older path by a number", "3", `snapshotter = "hearth"` + "\n  [", "snapshotter = 'hearth'\nmax_concurrent_downloads = 8\n  [", "containerd.pull_path", doctor.Problem, "[plugins.'io.containerd.cri.v1.images']", "disable_snapshot_annotations = false"},
		{"version 2 without annotations", "2", "disable_snapshot_annotations = false", "", "containerd.pull_path", doctor.Warning, "[plugins.'io.containerd.grpc.v1.cri'.containerd]", "disable_snapshot_annotations = false"},
		{"blobs discarded", "3", `snapshotter = "hearth"` + "\n  [", "snapshotter = 'hearth'\ndiscard_unpacked_layers = true\n  [", "containerd.discard_unpacked_layers", doctor.Warning, "[plugins.'io.containerd.cri.v1.images']", "discard_unpacked_layers = false"},
		{"no unpack_config", "3", "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]", "[nothing]", "containerd.unpack_config", doctor.Problem, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]", "snapshotter = 'hearth'"},
		{"unpack_config for another", "3", "\n  snapshotter = \"hearth\"\n  differ", "\n  snapshotter = 'overlayfs'\n  differ", "containerd.unpack_config", doctor.Problem, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]", "snapshotter = 'hearth'"},
		{"no differ", "3", `differ = "walking"`, "", "containerd.unpack_config", doctor.Problem, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]", "differ = 'walking'"},
		{"parallel unpack", "3", "[[plugins", "[plugins.'io.containerd.transfer.v1.local']\nmax_concurrent_unpacks = 4\n[[plugins", "containerd.parallel_unpack", doctor.Warning, "[plugins.'io.containerd.transfer.v1.local']", "max_concurrent_unpacks = 1"},
		{"no config_path", "3", `config_path = "/etc/containerd/certs.d"`, "", "containerd.registry", doctor.Warning, "[plugins.'io.containerd.cri.v1.images'.registry]", "config_path = "},
		{"mirrors", "2", `config_path = "/etc/containerd/certs.d"`, "mirrors = {'docker.io' = {endpoint = ['http://127.0.0.1']}}", "containerd.registry", doctor.Problem, "[plugins.'io.containerd.grpc.v1.cri'.registry]", "mirrors"},
		{"empty sandbox image", "2", `[plugins."io.containerd.grpc.v1.cri".containerd]`, "[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = ''\n[plugins.'io.containerd.grpc.v1.cri'.containerd]", "containerd.sandbox_image", doctor.Problem, "[plugins.'io.containerd.grpc.v1.cri']", "sandbox_image = "},
		{"no runtimes in version 2", "2", "containerd.runtimes.runc]", "other]", "config.version", doctor.Problem, "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]", "runtime_type"},
		{"no version", "2", "version = 2", "", "config.version", doctor.Warning, "", "version = 3"},
		{"settings of version 2 in version 3", "2", "version = 2", "version = 3", "config.version", doctor.Warning, "[plugins.'io.containerd.cri.v1.images']", "snapshotter = "},
		{"settings of version 2 in version 4", "2", "version = 2", "version = 4", "config.version", doctor.Problem, "[plugins.'io.containerd.cri.v1.images']", "snapshotter = "},
		{"settings of version 3 in version 2", "3", "version = 3", "version = 2", "config.version", doctor.Warning, "", "version = 3"},
		{"socket of version 3 in version 4", "3", "version = 3", "version = 4\n[grpc]\naddress = '/run/other.sock'", "config.version", doctor.Problem, "[plugins.'io.containerd.server.v1.grpc']", "address = "},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := strings.Replace(good[c.version], c.from, c.to, 1)
			if c.from == "[proxy_plugins.hearth" {
				text = strings.ReplaceAll(good[c.version], c.from, c.to)
			}
			if text == good[c.version] {
				t.Fatal("the trap changes nothing")
			}
			for _, f := range diagnose(t, text) {
				if f.Check == c.check && f.Status == c.status && f.Fix != nil && f.Fix.Table == c.table && strings.Contains(f.Fix.Line, c.line) && f.Meaning != "" {
					if f.Fix.File != "-" {
						t.Errorf("names file %q", f.Fix.File)
					}
					return
				}
			}
			t.Errorf("not found among %+v", diagnose(t, text))
		})
	}
}

func diagnose(t *testing.T, text string) []doctor.Finding {
	t.Helper()
	c, err := doctor.Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return doctor.Diagnose(c, nil, "hearth")
}

func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A drop-in that undoes a setting is the file to change.
func TestImports(t *testing.T) {
	dir := t.TempDir()
	main := write(t, dir, "config.toml", strings.Replace(good["3"], "version = 3", "version = 3\nimports = ['conf.d/*.toml', 'config.toml']", 1))
	write(t, dir, "conf.d/10-a.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n")
	dropIn := write(t, dir, "conf.d/20-b.toml", "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'devmapper'\nruntimes.runc.runtime_type = 'io.containerd.runc.v2'\n")
	c, err := doctor.Load(main)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range doctor.Diagnose(c, nil, "hearth") {
		if f.Status == doctor.OK {
			continue
		}
		want := doctor.Fix{File: dropIn, Table: "[plugins.'io.containerd.grpc.v1.cri'.containerd]", Line: "snapshotter = 'hearth'"}
		if f.Check != "containerd.cri" || *f.Fix != want {
			t.Errorf("%+v, %+v", f, f.Fix)
		}
	}
}

func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct{ text, want string }{
		"syntax":  {"version = 3\n[plugins\n", "line 2"},
		"version": {"version = 9", "none that this doctor knows"},
		"large":   {"#" + strings.Repeat("x", 1<<20), "larger than"},
		"import":  {"imports = ['missing.toml']", "missing.toml"},
		"glob":    {"imports = ['[*']", "imports of"},
	} {
		path := write(t, dir, name, c.text)
		if _, err := doctor.Load(path); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: error %v, want %q and the path", name, err, c.want)
		}
	}
}

func healthy() *doctor.Facts {
	yes := true
	return &doctor.Facts{
		CgroupVersion: 2, Systemd: true,
		Containerd: doctor.Containerd{Version: "2.4.2", SysResource: &yes, Plugins: map[string]string{"io.containerd.snapshotter.v1.hearth": ""}},
		Disk:       &doctor.Disk{Path: "/d", Type: "ext4", Bytes: 100, FreeBytes: 50, Inodes: 100, FreeInodes: 50},
		Kubelet:    &doctor.Kubelet{CgroupDriver: "cgroupfs"},
	}
}

func TestMachine(t *testing.T) {
	no := false
	gone := errors.New("gone")
	for name, c := range map[string]struct {
		change func(*doctor.Facts)
		check  string
		status doctor.Status
	}{
		"healthy":             {func(*doctor.Facts) {}, "", doctor.OK},
		"no overlayfs":        {func(f *doctor.Facts) { f.Overlay = gone }, "kernel.overlayfs", doctor.Problem},
		"no erofs":            {func(f *doctor.Facts) { f.EROFS = gone }, "kernel.erofs", doctor.Warning},
		"no move_mount":       {func(f *doctor.Facts) { f.Mounts = gone }, "kernel.mounts", doctor.Warning},
		"no eBPF":             {func(f *doctor.Facts) { f.BPF = gone }, "kernel.ebpf", doctor.Warning},
		"no containerd":       {func(f *doctor.Facts) { f.Containerd = doctor.Containerd{Err: gone} }, "containerd.running", doctor.Problem},
		"failed plugin":       {func(f *doctor.Facts) { f.Containerd.Plugins["io.containerd.cri.v1.images"] = "no" }, "containerd.running", doctor.Problem},
		"not restarted":       {func(f *doctor.Facts) { f.Containerd.Plugins = nil }, "containerd.running", doctor.Problem},
		"rebase in the air":   {func(f *doctor.Facts) { f.Containerd.Capabilities = []string{"rebase"} }, "containerd.rebase", doctor.Problem},
		"containerd 1":        {func(f *doctor.Facts) { f.Containerd.Version = "v1.7.27" }, "containerd.pull_path", doctor.Problem},
		"no CAP_SYS_RESOURCE": {func(f *doctor.Facts) { f.Containerd.SysResource = &no }, "containerd.oom_score", doctor.Problem},
		"who knows":           {func(f *doctor.Facts) { f.Containerd.SysResource = nil }, "containerd.oom_score", doctor.Warning},
		"no cgroups":          {func(f *doctor.Facts) { f.CgroupVersion = 0 }, "cgroups", doctor.Problem},
		"cgroup drivers":      {func(f *doctor.Facts) { f.Kubelet.CgroupDriver = "systemd" }, "cgroups", doctor.Warning},
		"cgroups 1":           {func(f *doctor.Facts) { f.CgroupVersion, f.Kubelet.FailCgroupV1 = 1, true }, "cgroups", doctor.Problem},
		"no snapshotter":      {func(f *doctor.Facts) { f.Snapshotter = gone }, "nodeagent.snapshotter", doctor.Problem},
		"no nodeagent":        {func(f *doctor.Facts) { f.Nodeagent = gone }, "nodeagent.api", doctor.Problem},
		"no root":             {func(f *doctor.Facts) { f.Disk.Err = gone }, "disk", doctor.Problem},
		"overlay on overlay":  {func(f *doctor.Facts) { f.Disk.Type = "overlay" }, "disk", doctor.Problem},
		"network disk":        {func(f *doctor.Facts) { f.Disk.Type = "nfs" }, "disk", doctor.Problem},
		"in memory":           {func(f *doctor.Facts) { f.Disk.Type = "tmpfs" }, "disk", doctor.Warning},
		"little space":        {func(f *doctor.Facts) { f.Disk.FreeBytes = 10 }, "disk", doctor.Warning},
		"no inodes":           {func(f *doctor.Facts) { f.Disk.FreeInodes = 0 }, "disk", doctor.Problem},
		"inodes on demand":    {func(f *doctor.Facts) { f.Disk.FreeInodes, f.Disk.Inodes = 0, 0 }, "", doctor.OK},
	} {
		facts := healthy()
		c.change(facts)
		config, err := doctor.Parse(strings.NewReader(good["3"]))
		if err != nil {
			t.Fatal(err)
		}
		found := c.check == ""
		findings := doctor.Diagnose(config, facts, "hearth")
		for _, f := range findings {
			switch {
			case f.Status == doctor.OK:
			case f.Check == c.check && f.Status == c.status && f.Meaning != "" && f.Fix.String() != "":
				found = true
			default:
				t.Errorf("%s: also %+v", name, f)
			}
		}
		if !found || doctor.Failed(findings) != (c.status == doctor.Problem) {
			t.Errorf("%s: %s of %s not found, or the whole is misjudged: %+v", name, c.status, c.check, findings)
		}
	}
}

// Probe must come to an end on any machine, and say that what is not there is not there.
func TestProbe(t *testing.T) {
	dir := t.TempDir()
	kubelet := write(t, dir, "kubelet.yaml", "kind: KubeletConfiguration\ncgroupDriver: systemd\n")
	facts, err := doctor.Probe(t.Context(), doctor.Places{
		Containerd: filepath.Join(dir, "c.sock"), Snapshotter: filepath.Join(dir, "s.sock"), Nodeagent: filepath.Join(dir, "n.sock"),
		Name: "hearth", Root: dir, Kubelet: kubelet,
	})
	if err != nil {
		t.Fatal(err)
	}
	if facts.Containerd.Err == nil || facts.Snapshotter == nil || facts.Nodeagent == nil {
		t.Errorf("sockets that are not there answer: %+v", facts)
	}
	if facts.Disk == nil || facts.Disk.Err != nil || facts.Disk.Bytes == 0 || facts.Disk.Type == "" {
		t.Errorf("disk %+v", facts.Disk)
	}
	if k := facts.Kubelet; k == nil || k.CgroupDriver != "systemd" || !k.FailCgroupV1 {
		t.Errorf("kubelet %+v", k)
	}
	if facts.Overlay != nil && os.Geteuid() == 0 {
		t.Errorf("tests of the snapshotter mount overlays here, and the doctor says: %v", facts.Overlay)
	}
	if _, err := doctor.Probe(t.Context(), doctor.Places{Kubelet: write(t, dir, "bad.yaml", "a: [")}); err == nil || !strings.Contains(err.Error(), "bad.yaml") {
		t.Errorf("a broken kubelet configuration: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{
		good["2"], good["3"], version4(), "", "version = 'x'", "plugins = 3", "proxy_plugins = []", "[proxy_plugins]\nhearth = 1",
		"[plugins]\n'io.containerd.cri.v1.images' = [1, {a = 2}]", "disabled_plugins = [1]", "imports = ['a', 1]",
		"[plugins.'io.containerd.transfer.v1.local']\nunpack_config = [1]", "a" + strings.Repeat(".a", 40) + " = 1",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := doctor.Parse(bytes.NewReader(data))
		if err != nil {
			return
		}
		for _, finding := range doctor.Diagnose(c, healthy(), "hearth") {
			if finding.Check == "" || finding.Status != doctor.OK && (finding.Meaning == "" || finding.Fix.String() == "") {
				t.Errorf("a finding that says nothing: %+v", finding)
			}
		}
	})
}
