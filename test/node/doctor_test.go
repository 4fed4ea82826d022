package node_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/internal/doctor"
)

// The doctor merges and migrates files as containerd does: what it says of them is what it says of containerd's own dump.
func TestDoctorReadsAsContainerd(t *testing.T) {
	tools := toolsDir(t)
	const proxy = `
[proxy_plugins.hearth]
type = 'snapshot'
address = '/run/h.sock'
[proxy_plugins.hearth.exports]
root = '/var/lib/h'
`
	for name, files := range map[string][]string{
		"version 2 with runtimes": {"version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'hearth'\ndiscard_unpacked_layers = true\nruntimes.runc.runtime_type = 'io.containerd.runc.v2'\n" + proxy},
		"empty":                   {"version = 3\n"},
		"version 2":               {"version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'hearth'\ndiscard_unpacked_layers = true\n" + proxy},
		"mixed":                   {"version = 3\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = ''\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'hearth'\n" + proxy},
		"no version":              {"[plugins.cri.containerd]\nsnapshotter = 'hearth'\n"},
		"proxy replaced":          {"version = 3\n" + proxy, "version = 3\n[proxy_plugins.hearth]\ntype = 'snapshot'\n[proxy_plugins.hearth.exports]\nenable_remote_snapshot_annotations = 'true'\n"},
		"table merged":            {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'hearth'\ndisable_snapshot_annotations = false\n", "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a'\n"},
		"false over true":         {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n", "version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = false\n"},
		"lists united":            {"version = 3\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n", "version = 3\ndisabled_plugins = ['io.containerd.cri.v1.images']\n"},
		"lists of tables":         {"version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'hearth'\ndiffer = 'walking'\n", "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'overlayfs'\ndiffer = 'walking'\n"},
		"mixed versions":          {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'a'\n", "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'hearth'\nruntimes.runc.runtime_type = 'io.containerd.runc.v2'\n"},
		"registered":              {"version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'overlayfs'\ndiffer = 'walking'\n", registered(t, "version = 3\n")},
		"registered, version 2":   {"version = 2\n", registered(t, "version = 2\n")},
		"registered, version 4":   {"version = 4\n", registered(t, "version = 4\n")},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for i, text := range files {
				path := filepath.Join(dir, "drop-in.toml")
				if i == 0 {
					path, text = filepath.Join(dir, "config.toml"), "imports = ['drop-*.toml']\n"+text
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			ours, err := doctor.Load(filepath.Join(dir, "config.toml"))
			if err != nil {
				t.Fatal(err)
			}
			dump, err := exec.CommandContext(t.Context(), filepath.Join(tools, "containerd"), "--config", filepath.Join(dir, "config.toml"), "config", "dump").Output()
			if err != nil {
				t.Fatal(err)
			}
			theirs, err := doctor.Parse(bytes.NewReader(dump))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(statuses(theirs), statuses(ours)); diff != "" {
				t.Errorf("-containerd +doctor\n%s", diff)
			}
			want := doctor.Registration{Name: "hearth", Address: "/run/h.sock", Root: "/var/lib/h"}
			if mine, its := want.Missing(ours) == nil, want.Missing(theirs) == nil; mine != its || strings.HasPrefix(name, "registered") != mine {
				t.Errorf("registered: %v by our reading, %v by containerd's", mine, its)
			}
		})
	}
}

// registered is the drop-in that nodeagent register lays over a configuration. The real containerd has to find in it what we do.
func registered(t *testing.T, text string) string {
	t.Helper()
	c, err := doctor.Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	drop, _, err := doctor.Registration{Name: "hearth", Address: "/run/h.sock", Root: "/var/lib/h"}.Text(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(drop)
}

// statuses are the findings that do not depend on the version of the file.
func statuses(c *doctor.Config) map[string]string {
	out := map[string]string{}
	for _, f := range doctor.Diagnose(c, nil, "hearth") {
		if f.Check != "config.version" && f.Check != "containerd.pull_path" && f.Check != "containerd.sandbox_image" {
			out[f.Check] += string(f.Status) + ": " + f.Found + "\n"
		}
	}
	return out
}

// On a node where pulls work, nothing but nodeagent's own socket, which there is none of here, is at fault.
func TestDoctorOnANode(t *testing.T) {
	n := newPullNode(t, false)
	config, err := doctor.Load(filepath.Join(n.Dir, "config.toml"))
	if err != nil {
		t.Fatal(err)
	}
	address, root := config.Proxy("hearth")
	facts, err := doctor.Probe(t.Context(), doctor.Places{
		Containerd: config.Socket(), Snapshotter: address, Name: "hearth", Root: root, Nodeagent: filepath.Join(n.Dir, "node.sock"),
	})
	if err != nil {
		t.Fatal(err)
	}
	problems := 0
	for _, f := range doctor.Diagnose(config, facts, "hearth") {
		if f.Status == doctor.Problem {
			problems++
			if f.Check != "nodeagent.api" {
				t.Errorf("%+v", f)
			}
		}
	}
	if problems != 1 || facts.Containerd.SysResource == nil || len(facts.Containerd.Plugins) < 4 {
		t.Errorf("%d problems; containerd %+v", problems, facts.Containerd)
	}
}
