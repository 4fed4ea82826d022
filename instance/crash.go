package instance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// How long the kernel's word that a process has ended waits for containerd's, which has the status: a moment while it only goes
// to the log, longer while a caller is told of a start that failed.
const (
	statusMoment  = 25 * time.Millisecond
	statusPatient = 2 * time.Second
)

// watchProcess has the engine notice the end of an Instance's process at once. containerd tells it too, with the status, and
// mostly within 30 ms; but not while it is away, and late when it is busy.
func (e *Engine) watchProcess(i *instance, pid uint32) {
	if pid == 0 {
		return
	}
	e.spawn(func(ctx context.Context) {
		if err := e.backend.AwaitEnd(ctx, pid); err != nil {
			if ctx.Err() == nil {
				e.log.Warn("the kernel does not tell when the process ends", "instance", i.id, "error", err)
			}
			return
		}
		i.mu.Lock()
		wait := statusMoment
		if i.state == hearthv1.State_STATE_CLAIMED {
			wait = statusPatient
		}
		i.mu.Unlock()
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-i.exited: // it was told with its status
		case <-i.done:
		case <-ctx.Done():
		case <-timer.C:
			e.processEnded(i, unknownStatus)
		}
	})
}

// AwaitEnd implements tasks, with a pidfd that Go's own poller waits for; see pidfd_open(2).
func (*node) AwaitEnd(ctx context.Context, pid uint32) error {
	fd, err := unix.PidfdOpen(int(pid), unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", pid, err)
	}
	defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })()
	err = conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 && err == nil
	})
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", pid, err)
	}
	return nil
}
