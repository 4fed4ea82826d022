package instance_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

func TestHolderGroup(t *testing.T) {
	for name, c := range map[string]struct{ text, holder string }{
		"version 2, cgroupfs":                {"0::/kubepods/burstable/pod12-34/abcdef\n", "/kubepods/burstable/pod12-34/abcdef"},
		"version 2, moved":                   {"0::/kubepods/burstable/pod12-34/abcdef/holder\n", "/kubepods/burstable/pod12-34/abcdef"},
		"version 2, systemd":                 {"0::/kubepods.slice/kubepods-podx.slice/cri-containerd-a.scope\n", "/kubepods.slice/kubepods-podx.slice/cri-containerd-a.scope"},
		"version 1":                          {"9:name=systemd:/\n4:memory:/kubepods/podx/box\n3:cpu,cpuacct:/kubepods/podx/box\n2:freezer:/kubepods/podx/box\n0::/\n", "/kubepods/podx/box"},
		"version 1, hierarchies that differ": {text: "4:memory:/kubepods/podx/box\n2:freezer:/kubepods/pody/box\n"},
		"above what we see":                  {text: "0::/../kubepods/podx/box\n"},
		"above it, from the root":            {text: "0::/../../box\n"},
		"no pod's":                           {text: "0::/box\n"},
		"no pod's, moved":                    {text: "0::/box/holder\n"},
		"the root":                           {text: "0::/\n"},
		"not clean":                          {text: "0::/kubepods/../podx/box\n"},
		"relative":                           {text: "0::kubepods/podx/box\n"},
		"nothing":                            {},
		"no line of it":                      {text: "0:/x\n"},
	} {
		t.Run(name, func(t *testing.T) {
			holder, err := instance.ParseHolderGroup([]byte(c.text))
			if holder != c.holder || (err == nil) != (c.holder != "") {
				t.Fatalf("it is %q, %v, want %q", holder, err, c.holder)
			}
		})
	}
}

func FuzzHolderGroup(f *testing.F) {
	f.Add([]byte("0::/kubepods/podx/box\n"))
	f.Add([]byte("4:memory:/a/b\n2:freezer:/a/b\n0::/\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		holder, err := instance.ParseHolderGroup(text)
		if err == nil && (filepath.Clean(holder) != holder || !filepath.IsAbs(holder) || filepath.Dir(holder) == "/" || !bytes.Contains(text, []byte(holder))) {
			t.Errorf("%q has a holder's cgroup %q", text, holder)
		}
	})
}

// With version 2 a holder's processes make room for cgroups below theirs, and are still known to be there.
func TestMakeRoom(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root mounts cgroups")
	}
	root := t.TempDir()
	if err := unix.Mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
		t.Skipf("no cgroup2 to be had: %v", err)
	}
	defer func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	_, own, found := strings.Cut("\n"+string(self), "\n0::")
	if !found {
		t.Skip("there is no hierarchy of version 2")
	}
	own, _, _ = strings.Cut(own, "\n")
	parent := filepath.Join(own, fmt.Sprintf("hearth-room-%d", os.Getpid()))
	group := filepath.Join(parent, "pod", "box")
	if err := os.MkdirAll(filepath.Join(root, group), 0o755); err != nil {
		t.Skipf("no cgroup may be made: %v", err)
	}
	defer func() {
		for _, path := range []string{group + "/holder", group, filepath.Dir(group), parent} {
			if err := os.Remove(filepath.Join(root, path)); err != nil {
				t.Error(err)
			}
		}
	}()
	cmd := exec.Command("sleep", "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	if err := os.WriteFile(filepath.Join(root, group, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := instance.MakeRoom(root, group); err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]string{group: "", group + "/holder": strconv.Itoa(cmd.Process.Pid) + "\n"} {
			if got, err := os.ReadFile(filepath.Join(root, path, "cgroup.procs")); string(got) != want || err != nil {
				t.Errorf("in %s is %q, want %q (%v)", path, got, want, err)
			}
		}
	}
}

// What is below a holder's cgroup is made there by runc itself, whoever has made the holder's.
func TestByPath(t *testing.T) {
	for _, systemd := range []bool{false, true} {
		before, err := typeurl.MarshalAny(&options.Options{SystemdCgroup: systemd, BinaryName: "runc", Root: "/r"})
		if err != nil {
			t.Fatal(err)
		}
		r, err := instance.ByPath(containers.RuntimeInfo{Name: "io.containerd.runc.v2", Options: before})
		if err != nil {
			t.Fatal(err)
		}
		got, err := typeurl.UnmarshalAny(r.Options)
		if o, ok := got.(*options.Options); err != nil || !ok || o.SystemdCgroup || o.BinaryName != "runc" || o.Root != "/r" {
			t.Errorf("it is %v, %v", got, err)
		}
	}
	if r, err := instance.ByPath(containers.RuntimeInfo{Name: "x"}); err != nil || r.Options != nil {
		t.Errorf("without options: %v, %v", r, err)
	}
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
