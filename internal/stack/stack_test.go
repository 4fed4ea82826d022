package stack_test

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/hearth-serverless/hearth/internal/stack"
)

// deployment is a place with the real tools and small daemons.
func deployment(t *testing.T) stack.Config {
	t.Helper()
	tools := os.Getenv("HEARTH_TOOLS")
	if tools == "" {
		tools = "../../.cache/tools/current"
	}
	tools, err := filepath.Abs(tools)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(tools, "containerd")); err != nil {
		t.Skip("needs containerd: make tools")
	}
	c := place(t)
	c.Tools, c.Bin, c.PauseImage = tools, c.Root+"-bin", filepath.Join(t.TempDir(), "pause.tar")
	c.GatewayAddress, c.RegistryAddress, c.Registry = "127.0.0.1:0", "127.0.0.1:0", true
	if err := os.Mkdir(c.Bin, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(c.Bin) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"nodeagent", "launcher", "logwriter", "poolmanager", "gateway"} {
		if err := os.Symlink(self, filepath.Join(c.Bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	image, err := random.Image(1000, 1)
	if err != nil {
		t.Fatal(err)
	}
	if image, err = mutate.ConfigFile(image, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: rootFS(t, image)}); err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(c.PauseImage, name.MustParseReference("hearth.local/pause:1"), image); err != nil {
		t.Fatal(err)
	}
	return c
}

func rootFS(t *testing.T, image v1.Image) v1.RootFS {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return config.RootFS
}

// eventually asks until the answer is yes.
func eventually(t *testing.T, what string, ask func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ask(); {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func find(t *testing.T, run, daemon string) stack.Daemon {
	t.Helper()
	s, err := stack.Inspect(t.Context(), run)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range s.Daemons {
		if d.Name == daemon {
			return d
		}
	}
	return stack.Daemon{}
}

func TestUpKillDown(t *testing.T) {
	c := deployment(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ready, done := make(chan *stack.Status, 1), make(chan error, 1)
	c.Progress = func(line string) { t.Log(line) }
	go func() { done <- stack.Run(ctx, c, func(s *stack.Status) { ready <- s }) }()
	select {
	case err := <-done:
		t.Fatal(err)
	case s := <-ready:
		if len(s.Daemons) != 5 || s.Gateway == "" || s.Registry == "" || s.Subnet == "" {
			t.Errorf("status %+v", s)
		}
	}
	if err := stack.Run(ctx, c, nil); !errors.Is(err, stack.ErrRunning) {
		t.Errorf("a second one: %v", err)
	}
	for _, name := range []string{"containerd", "nodeagent", "poolmanager", "gateway", "registry"} {
		var before stack.Daemon
		eventually(t, name+" is ready", func() bool { // who is told that all is ready may be ahead of the status file
			before = find(t, c.Run, name)
			return before.Ready
		})
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" is ready again", func() bool {
			d := find(t, c.Run, name)
			return d.Ready && d.PID != before.PID && d.Restarts > before.Restarts
		})
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if left := leftovers(t, c); left != "" {
		t.Errorf("left:\n%s", left)
	}
	if _, err := os.Stat(c.Run); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", c.Run, err)
	}
}

// A daemon that cannot start is named, with the end of its log, and nothing is left.
func TestUpFails(t *testing.T) {
	c := deployment(t)
	broken := filepath.Join(c.Bin, "poolmanager")
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(broken, []byte("#!/bin/sh\necho the disk is full\nexit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	err := stack.Run(t.Context(), c, nil)
	if err == nil || !strings.Contains(err.Error(), "poolmanager does not become ready") || !strings.Contains(err.Error(), "the disk is full") {
		t.Errorf("got %v", err)
	}
	if left := leftovers(t, c); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

func TestDownAfterKilledSupervisor(t *testing.T) {
	c := deployment(t)
	for _, kill := range []bool{true, false} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "TEST_SUPERVISOR="+strings.Join([]string{c.Root, c.Run, c.Name, c.Tools, c.PauseImage}, ":"))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "ready" {
			_ = cmd.Process.Kill()
			t.Fatalf("says %q", lines.Text())
		}
		if kill {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if left := leftovers(t, c); !strings.Contains(left, "containerd") || !strings.Contains(left, "nodeagent") {
				t.Errorf("leftovers after the kill:\n%s", left)
			}
		}
		if err := stack.Down(t.Context(), c); err != nil {
			t.Error(err)
		}
		if left := leftovers(t, c); left != "" {
			t.Errorf("left:\n%s", left)
		}
		if !kill {
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		}
	}
}
