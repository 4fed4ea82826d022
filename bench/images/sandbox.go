package images

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

// sandboxTail is how much of a command's output an error shows.
const sandboxTail = 4 << 10

// sandbox runs a shell script as the first process of its own mount, process and IPC namespaces, in dir. All that it
// mounts and starts is gone when it ends or is killed, which is why nothing here ever unmounts. The script stops at the
// first command that fails, and finds args as $1 and on. An error ends with the last of what it printed.
func sandbox(ctx context.Context, dir, script string, args ...string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("this needs root, to mount and chroot: run it again as root")
	}
	// The parent-death signal follows the thread that started the child, so that thread must live as long.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	command := exec.CommandContext(ctx, "/bin/sh", append([]string{"-euc", "mount -t proc proc /proc\n" + script, "sh"}, args...)...)
	command.Dir = dir
	command.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	output := &tail{limit: sandboxTail}
	command.Stdout, command.Stderr = output, output
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC,
		Unshareflags: syscall.CLONE_NEWNS, // and so all mounts become private
		Pdeathsig:    syscall.SIGKILL,
		Setsid:       true, // Ctrl-C is for us: we then kill the namespace's first process, and with it all of them
	}
	if err := command.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w; it said:\n%s", err, bytes.TrimSpace(output.kept))
	}
	return nil
}

// tail is a writer that keeps the last bytes written to it.
type tail struct {
	limit int
	kept  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p...)
	if over := len(t.kept) - t.limit; over > 0 {
		t.kept = append(t.kept[:0], t.kept[over:]...)
	}
	return len(p), nil
}
