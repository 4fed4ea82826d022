package instance_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/instance"
)

// TestFreezer freezes a process by the kernel's own freezers: whatever version is mounted, and version 2 where it is mounted
// beside version 1.
func TestFreezer(t *testing.T) {
	if os.Geteuid() != 0 { // the one probe: as root nothing skips
		t.Skip("making cgroups wants root")
	}
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(root); err != nil {
			continue
		}
		t.Run(filepath.Base(root), func(t *testing.T) {
			parent := fmt.Sprintf("/hearth-freezer-%d", os.Getpid())
			f := instance.NewFreezer(root, parent)
			if err := f.Thaw(); err != nil {
				t.Errorf("thaw of what is not there: %v", err)
			}
			dir := f.Directory()
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			p := exec.Command("sleep", "3600")
			if err := p.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			t.Cleanup(func() {
				_ = f.Thaw()
				_ = p.Process.Kill()
				<-ended
				for _, d := range []string{dir, filepath.Dir(dir), filepath.Dir(filepath.Dir(dir))} {
					if err := os.Remove(d); err != nil {
						t.Error(err)
					}
				}
			})
			go func() { ended <- p.Wait(); close(ended) }()
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p.Process.Pid)), 0); err != nil {
				t.Fatal(err)
			}
			wantThawed(t, f, true)
			for range 2 { // again is no error
				if err := f.Freeze(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			wantThawed(t, f, false)
			if err := p.Process.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
			// Version 2 lets through what kills: it may be dead, and waited for or not, also while its status is read.
			died := errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || bytes.Contains(status, []byte("\nState:\tZ")) || bytes.Contains(status, []byte("\nState:\tX"))
			if !died && (err != nil || !instance.EndPending(status)) {
				t.Errorf("SIGTERM is not pending: %v\n%s", err, status)
			}
			if err := f.Thaw(); err != nil {
				t.Fatal(err)
			}
			wantThawed(t, f, true)
			if err := <-ended; p.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGTERM {
				t.Errorf("it ended with %v", err)
			}
		})
	}
}

func wantThawed(t *testing.T, f instance.Freezer, want bool) {
	t.Helper()
	if got, err := f.Thawed(); err != nil || got != want {
		t.Errorf("thawed is %t, %v, want %t", got, err, want)
	}
}
