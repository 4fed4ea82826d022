package stack_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/stack"
)

// place makes the folders of a deployment that is this test's own. Socket paths are short, so t.TempDir does not do.
func place(t *testing.T) stack.Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root, err := os.MkdirTemp("/tmp", "hearth-root-")
	if err != nil {
		t.Fatal(err)
	}
	run, err := os.MkdirTemp("/tmp", "hr-")
	if err != nil {
		t.Fatal(err)
	}
	c := stack.Config{Name: "t" + strings.ToLower(filepath.Base(run)[3:]), Root: root, Run: run, Bin: root}
	t.Cleanup(func() {
		if c, err := c.WithDefaults(); err == nil {
			_ = c.Clear(context.Background())
		}
		_ = os.RemoveAll(root)
		_ = os.RemoveAll(run)
	})
	return c
}

func leftovers(t *testing.T, c stack.Config) string {
	t.Helper()
	left, err := stack.Leftovers(c)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(left, "\n")
}

// A supervisor that was killed leaves processes (some that do not heed SIGTERM), mounts, a cgroup and files.
func TestDownClearsAfterADeadSupervisor(t *testing.T) {
	c := place(t)
	full, err := c.WithDefaults()
	if err != nil {
		t.Fatal(err)
	}
	env := full.ChildEnv([]string{"PATH=/bin:/usr/bin"})
	_, wait, err := stack.Command("/bin/sh", []string{"-c", "trap '' TERM; sleep 1000 & wait; wait"}, env, filepath.Join(c.Root, "log"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- wait() }()
	mounted := filepath.Join(c.Run, "mounted here")
	if err := os.Mkdir(mounted, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", mounted, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	sleeper := inCgroup(t, c.Name)
	left := leftovers(t, c)
	for _, want := range []string{"process ", "mount " + mounted, "cgroup "} {
		if !strings.Contains(left, want) {
			t.Errorf("leftovers do not list %q:\n%s", want, left)
		}
	}
	if err := stack.Down(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, c); left != "" {
		t.Errorf("left after down:\n%s", left)
	}
	<-ended
	if err := sleeper.Wait(); err == nil {
		t.Error("the process in the cgroup was not killed")
	}
	if err := stack.Down(t.Context(), c); !errors.Is(err, stack.ErrDown) {
		t.Errorf("down again: %v", err)
	}
}

// inCgroup starts a process, frozen where that is possible, in a cgroup below the deployment's.
func inCgroup(t *testing.T, name string) *exec.Cmd {
	t.Helper()
	parent := "/sys/fs/cgroup"
	if _, err := os.Stat(parent + "/freezer"); err == nil {
		parent += "/freezer"
	}
	dir := filepath.Join(parent, stack.CgroupParent(name), "instance")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, value := range map[string]string{"freezer.state": "FROZEN", "cgroup.freeze": "1"} {
		if _, err := os.Stat(filepath.Join(dir, file)); err == nil {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return cmd
}

func TestOneSupervisorAtATime(t *testing.T) {
	c := place(t)
	full, err := c.WithDefaults()
	if err != nil {
		t.Fatal(err)
	}
	release, err := full.LockForTest()
	if err != nil {
		t.Fatal(err)
	}
	if err := stack.Run(t.Context(), c, nil); !errors.Is(err, stack.ErrRunning) || !strings.Contains(err.Error(), "hearth down") {
		t.Errorf("same folders: %v", err)
	}
	other := place(t)
	other.Name = c.Name
	if err := stack.Run(t.Context(), other, nil); !errors.Is(err, stack.ErrRunning) || !strings.Contains(err.Error(), "--name") {
		t.Errorf("same name: %v", err)
	}
	release()
	other.Name = ""
	if err := stack.Run(t.Context(), c, nil); err == nil || !strings.Contains(err.Error(), "make tools") {
		t.Errorf("without tools: %v", err)
	}
}

// A supervisor that ends lets go of one lock after the other: who comes between them waits for the rest.
func TestDownWaitsForTheLastLock(t *testing.T) {
	c := place(t)
	full, err := c.WithDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.Run, "left"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		release, err := full.LockRootForTest()
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- stack.Down(t.Context(), c) }()
		synctest.Wait()
		release()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	if left := leftovers(t, c); left != "" {
		t.Errorf("left after down:\n%s", left)
	}
}

// A child is in a session of its own, and its log is set aside when it has grown.
func TestChildProcess(t *testing.T) {
	log := filepath.Join(t.TempDir(), "x.log")
	if err := os.WriteFile(log, make([]byte, 17<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	pid, wait, err := stack.Command("/bin/sh", []string{"-c", "echo hello; ps -o sid= $$ || true"}, []string{"PATH=/bin:/usr/bin"}, log)
	if err != nil {
		t.Fatal(err)
	}
	if err := wait(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(log)
	if err != nil || !strings.HasPrefix(string(data), "hello\n") || !strings.Contains(string(data), fmt.Sprint(pid)) {
		t.Errorf("log %q, pid %d, %v", data, pid, err)
	}
	if _, err := os.Stat(log + ".1"); err != nil {
		t.Error(err)
	}
}

func TestStatusOfNothing(t *testing.T) {
	if _, err := stack.ReadStatus(t.TempDir()); !errors.Is(err, stack.ErrDown) {
		t.Errorf("got %v", err)
	}
	c := place(t)
	// What a killed supervisor leaves is not the status of anything.
	if err := os.WriteFile(filepath.Join(c.Run, "status.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := stack.ReadStatus(c.Run); !errors.Is(err, stack.ErrDown) {
		t.Errorf("got %v", err)
	}
}
