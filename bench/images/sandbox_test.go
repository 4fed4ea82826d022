package images

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSandboxTellsWhatWentWrong(t *testing.T) {
	err := sandbox(t.Context(), t.TempDir(), `yes | head -c 100000; echo "the $1"; exit 3`, "reason")
	if err == nil || !strings.HasSuffix(err.Error(), "the reason") {
		t.Fatalf("error %v, want one that ends with what the script said", err)
	}
	if got := len(err.Error()); got > sandboxTail+100 {
		t.Errorf("the error is %d bytes long", got)
	}
}

// TestSandboxLeavesNothing ends a script that has mounted something and started a process that ignores signals.
func TestSandboxLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	ready := filepath.Join(dir, "ready")
	if err := unix.Mkfifo(ready, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- sandbox(ctx, dir, `mkdir tree; mount -t tmpfs tmpfs tree; (trap "" TERM INT HUP; exec sleep 1000) & echo up >ready; wait`)
	}()
	// Reading waits for the script; writing too keeps this from waiting for ever if the script ends early.
	fifo, err := os.OpenFile(ready, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer fifo.Close()
	up := make(chan error, 1)
	go func() {
		_, err := fifo.Read(make([]byte, 3))
		up <- err
	}()
	select {
	case err := <-ended:
		t.Fatalf("it ended by itself: %v", err)
	case err := <-up:
		if err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that of the context", err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		t.Errorf("a mount is left:\n%s", mounts)
	}
	for _, path := range processes(t) {
		if cwd, err := os.Readlink(filepath.Join(path, "cwd")); err == nil && cwd == dir {
			t.Errorf("process %s is left", path)
		}
	}
}

func processes(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*")
	if err != nil || len(found) == 0 {
		t.Fatalf("no processes: %v", err)
	}
	return found
}
