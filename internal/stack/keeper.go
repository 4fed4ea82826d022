package stack

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/hearth-serverless/hearth/internal/host"
)

// How a child that ended is started again.
const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 2 * time.Second
	healthyTime  = 10 * time.Second // a child that lived this long begins anew with firstBackoff
)

// child is a process that was started.
type child interface {
	pid() int
	// wait returns when it has ended, with how.
	wait() error
	// stop asks it to end; kill does not ask.
	stop()
	kill()
}

// keeper keeps one child alive.
type keeper struct {
	name  string
	start func() (child, error)
	grace time.Duration // between stop and kill
	log   *slog.Logger
	// report is told of each start (pid > 0) and end (pid 0), one call at a time.
	report func(name string, pid int, ended error)
}

// run starts the child again whenever it ends, until ctx is done; then it ends the child and returns when that is gone.
func (k *keeper) run(ctx context.Context) {
	backoff := firstBackoff
	for ctx.Err() == nil {
		began := time.Now()
		err := k.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) >= healthyTime {
			backoff = firstBackoff
		}
		k.log.Warn("daemon ended; starting it again", "daemon", k.name, "err", err, "after", time.Since(began), "pause", backoff)
		if !host.Pause(ctx, backoff) {
			return
		}
		backoff = min(2*backoff, lastBackoff)
	}
}

// once runs the child to its end, which ctx brings about.
func (k *keeper) once(ctx context.Context) error {
	c, err := k.start()
	if err != nil {
		k.report(k.name, 0, err)
		return fmt.Errorf("start %s: %w", k.name, err)
	}
	k.report(k.name, c.pid(), nil)
	ended := make(chan error, 1)
	go func() { ended <- c.wait() }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		err = k.end(c, ended)
	}
	if err == nil {
		err = errEnded
	}
	k.report(k.name, 0, err)
	return err
}

func (k *keeper) end(c child, ended <-chan error) error {
	c.stop()
	late := time.NewTimer(k.grace)
	defer late.Stop()
	select {
	case err := <-ended:
		return err
	case <-late.C:
		k.log.Warn("daemon does not end; killing it", "daemon", k.name, "after", k.grace)
		c.kill()
		return <-ended
	}
}
