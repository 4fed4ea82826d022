package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

// stopTime is how long a supervisor may take to end in good order.
const stopTime = 90 * time.Second

// Down ends the deployment: it asks the supervisor to, and waits; when that is dead or does not end, it clears up itself. It
// returns ErrDown when there was nothing to do. Only Name, Root and Run of the Config matter.
func Down(ctx context.Context, c Config) error {
	c, err := c.WithDefaults()
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("only root may end a deployment: run it with sudo")
	}
	left, err := Leftovers(c)
	if err != nil {
		return err
	}
	supervised := locked(c.paths().lock())
	if !supervised && len(left) == 0 {
		return fmt.Errorf("%w in %s", ErrDown, c.Run)
	}
	if supervised {
		if err := c.stopSupervisor(ctx); err != nil {
			return err
		}
	}
	held, err := c.lock(ctx, probeTime) // a supervisor that ends has let go of the first one when it still has the others
	if err != nil {
		return err
	}
	defer held.release()
	defer removeRun(c)
	return c.clear(ctx)
}

// stopSupervisor sends SIGTERM to the process that holds the lock and waits until it lets go; in the end it kills it.
func (c Config) stopSupervisor(ctx context.Context) error {
	pid, err := c.supervisorPID()
	if err != nil {
		return err
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop the supervisor, process %d: %w", pid, err)
	}
	patience, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	for locked(c.paths().lock()) {
		if host.Pause(patience, 20*time.Millisecond) {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.Logger.Warn("supervisor does not end; killing it", "pid", pid)
		_ = unix.Kill(pid, unix.SIGKILL)
		return c.awaitUnlocked(ctx)
	}
	return nil
}

func (c Config) awaitUnlocked(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	for locked(c.paths().lock()) {
		if !host.Pause(ctx, 20*time.Millisecond) {
			return errors.New("the supervisor was killed and still holds its lock")
		}
	}
	return nil
}

func (c Config) supervisorPID() (int, error) {
	data, err := os.ReadFile(c.paths().pid())
	if err != nil {
		return 0, fmt.Errorf("find the supervisor: %w; try again in a moment", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("find the supervisor: %s holds no process id", c.paths().pid())
	}
	return pid, nil
}
