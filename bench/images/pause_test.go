package images_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// TestPause runs the pause program as process 1 of a process namespace: it inherits orphans and reaps them, and SIGTERM
// ends it, which by default does nothing to a process 1.
func TestPause(t *testing.T) {
	root := t.TempDir()
	flat := mutate.Extract(load(t, build(t, t.TempDir(), "pause")))
	defer flat.Close()
	unpack := exec.CommandContext(t.Context(), "tar", "-xC", root)
	unpack.Stdin = flat
	if text, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("unpack: %v\n%s", err, text)
	}
	// The inner shell's child becomes an orphan, and ends only once its standard input does, which is the test's to close.
	pause := exec.CommandContext(t.Context(), "/bin/sh", "-c", `exec 3<&0; sh -c 'cat <&3 & '; exec "$1" </dev/null 3<&-`, "sh", filepath.Join(root, "pause"))
	pause.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	input, err := pause.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := pause.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pause.Process.Kill() })
	until(t, "the program runs with an orphan", func() bool {
		program, err := os.Readlink("/proc/" + strconv.Itoa(pause.Process.Pid) + "/exe")
		return err == nil && filepath.Base(program) == "pause" && children(t, pause.Process.Pid) == 1
	})
	_ = input.Close()
	until(t, "the orphan is reaped", func() bool { return children(t, pause.Process.Pid) == 0 })
	if err := pause.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := pause.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// children counts a process's children, the dead that nobody reaped among them.
func children(t *testing.T, pid int) int {
	t.Helper()
	lists, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/children")
	if err != nil || len(lists) == 0 {
		t.Fatalf("no list of children: %v", err)
	}
	n := 0
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		n += len(strings.Fields(string(text)))
	}
	return n
}

// until asks the kernel again and again: what it is asked for happens in another process, which tells nobody.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it did not come about that %s", what)
		}
	}
}
