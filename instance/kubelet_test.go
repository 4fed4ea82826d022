package instance_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

func TestPodGroup(t *testing.T) {
	for name, c := range map[string]struct{ text, pod, function, runc string }{
		"version 2, cgroupfs": {
			"0::/kubepods/burstable/pod12-34/abcdef\n",
			"/kubepods/burstable/pod12-34", "/kubepods/burstable/pod12-34/fn", "/kubepods/burstable/pod12-34/fn",
		},
		"version 2, systemd": {
			"0::/kubepods.slice/kubepods-pod12_34.slice/cri-containerd-abcdef.scope\n",
			"/kubepods.slice/kubepods-pod12_34.slice", "/kubepods.slice/kubepods-pod12_34.slice/hearth-a.fn.scope",
			"kubepods-pod12_34.slice:hearth:a.fn",
		},
		"version 1, cgroupfs": {
			"9:name=systemd:/\n4:memory:/kubepods/podx/box\n3:cpu,cpuacct:/kubepods/podx/box\n2:freezer:/kubepods/podx/box\n0::/\n",
			"/kubepods/podx", "/kubepods/podx/fn", "/kubepods/podx/fn",
		},
		"version 1, hierarchies that differ": {text: "4:memory:/kubepods/podx/box\n2:freezer:/kubepods/pody/box\n"},
		"above what we see":                  {text: "0::/../kubepods/podx/box\n"},
		"above it, from the root":            {text: "0::/../../box\n"},
		"no pod's":                           {text: "0::/box\n"},
		"the root":                           {text: "0::/\n"},
		"not clean":                          {text: "0::/kubepods/../podx/box\n"},
		"relative":                           {text: "0::kubepods/podx/box\n"},
		"nothing":                            {},
		"no line of it":                      {text: "0:/x\n"},
	} {
		t.Run(name, func(t *testing.T) {
			pod, err := instance.ParsePodGroup([]byte(c.text))
			if pod != c.pod || (err == nil) != (c.pod != "") {
				t.Fatalf("it is %q, %v, want %q", pod, err, c.pod)
			}
			if err != nil {
				return
			}
			if function, runc := instance.FunctionGroup(pod, "a"); function != c.function || runc != c.runc {
				t.Errorf("a Function is in %q, %q to runc, want %q, %q", function, runc, c.function, c.runc)
			}
		})
	}
}

func FuzzPodGroup(f *testing.F) {
	f.Add([]byte("0::/kubepods/podx/box\n"))
	f.Add([]byte("4:memory:/a/b\n2:freezer:/a/b\n0::/\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		pod, err := instance.ParsePodGroup(text)
		if err == nil && (filepath.Clean(pod) != pod || !filepath.IsAbs(pod) || pod == "/" || !bytes.Contains(text, []byte(pod))) {
			t.Errorf("%q has a pod's cgroup %q", text, pod)
		}
	})
}

// TestKubeletsSandboxes: what the kubelet has made and nothing of ours is in is left alone, at the start and later; and what is in it
// may become an Instance.
func TestKubeletsSandboxes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.foreign = true
		if _, err := f.RunSandbox(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		e := run(t, f)
		for range 3 {
			time.Sleep(time.Minute)
			synctest.Wait()
			if got := list(t, e); len(got) != 0 {
				t.Errorf("there are %v", got)
			}
		}
		if got := f.left(); got != "1 sandboxes, 0 containers, 0 snapshots" {
			t.Errorf("left: %s", got)
		}
		if err := create(e, "b"); err != nil {
			t.Fatal(err)
		}
		if got := list(t, e)["b"].GetState(); got != hearthv1.State_STATE_WARM {
			t.Errorf("it is %s", got)
		}
		f.exits <- instance.Exit{Container: "holder-2"}
		synctest.Wait()
		if got := list(t, e); len(got) != 0 {
			t.Errorf("when a pod's container has ended there are %v", got)
		}
	})
}

// TestStrays: a network namespace goes when it has been nobody's for long, and none does that anybody has.
func TestStrays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.config.NetworkDir = t.TempDir()
		for _, name := range []string{"cni-stray", "cni-named", "cni-lived", "cni-soon", "other"} {
			if err := os.WriteFile(filepath.Join(f.config.NetworkDir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		f.mentioned = map[string]bool{"cni-named": true, "cni-soon": true}
		thread := filepath.Join(f.host, "proc", "17", "task", "18", "ns")
		if err := os.MkdirAll(thread, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(filepath.Join(f.config.NetworkDir, "cni-lived"), filepath.Join(thread, "net")); err != nil {
			t.Fatal(err)
		}
		run(t, f) // which looks each 15 s
		wantNetworks := func(want ...string) {
			t.Helper()
			synctest.Wait()
			entries, err := os.ReadDir(f.config.NetworkDir)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, entry := range entries {
				got = append(got, entry.Name())
			}
			if !slices.Equal(got, want) {
				t.Errorf("there are %v, want %v", got, want)
			}
		}
		wantNetworks("cni-lived", "cni-named", "cni-soon", "cni-stray", "other")
		time.Sleep(time.Minute)
		f.set(func() { delete(f.mentioned, "cni-soon") })
		wantNetworks("cni-lived", "cni-named", "cni-soon", "cni-stray", "other")
		time.Sleep(65 * time.Second)
		wantNetworks("cni-lived", "cni-named", "cni-soon", "other")
		time.Sleep(75 * time.Second)
		wantNetworks("cni-lived", "cni-named", "other")
	})
}
