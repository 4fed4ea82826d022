package host_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/internal/host"
)

// A cgroup holds a process in every hierarchy as soon as it is made, may do what those above it may, and goes with its process.
func TestCgroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	top := fmt.Sprintf("/hearth-host-test-%d", os.Getpid())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dirs, err := host.MakeCgroup(top + "/a/b")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("made %v: %v", dirs, err)
	}
	t.Cleanup(func() { _ = host.RemoveCgroup(context.WithoutCancel(ctx), top) })
	again, err := host.MakeCgroup(top + "/a/b")
	if err != nil || len(again) != len(dirs) {
		t.Errorf("made again %v: %v", again, err)
	}
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, sleeper.Process.Pid), 0o600); err != nil {
			t.Error(err)
		}
		if got := host.Processes(dir); len(got) != 1 || got[0] != sleeper.Process.Pid {
			t.Errorf("%s has the processes %v", dir, got)
		}
		above := strings.TrimSuffix(dir, top+"/a/b")
		if want, err := os.ReadFile(filepath.Join(above, "cgroup.controllers")); err == nil && len(dirs) == 1 { // version 2 alone
			if got, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers")); err != nil || string(got) != string(want) {
				t.Errorf("%s has the controllers %q (%v), want %q", dir, got, err, want)
			}
		}
	}
	if err := host.RemoveCgroup(ctx, top); err != nil {
		t.Error(err)
	}
	if err := sleeper.Wait(); err == nil {
		t.Error("the process was not killed")
	}
	if left, err := host.Cgroups(top); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
