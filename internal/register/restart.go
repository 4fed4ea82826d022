package register

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/internal/doctor"
)

const (
	// lookEvery is the pause between two looks at a containerd that is to come back.
	lookEvery = 200 * time.Millisecond
	// commandTimeout bounds what restarts containerd.
	commandTimeout = 90 * time.Second
)

// restart has containerd read its configuration, if the one that runs has not read this drop-in. With an empty mark any plugin of
// the name will do.
func (r *registrar) restart(ctx context.Context, mark string) error {
	has := func(c doctor.Containerd) bool {
		return c.Err == nil && c.Exports != nil && (mark == "" || c.Exports[doctor.ExportMark] == mark)
	}
	switch {
	case r.process == nil:
		r.say("containerd does not run at %s: it will know the snapshotter when it starts", r.Containerd)
		return nil
	case has(r.running):
		r.say("the containerd that runs knows it: no restart is needed")
		return nil
	}
	c, err := r.again(ctx, has)
	if err != nil {
		return err
	}
	return worse(r.running, c)
}

// unload has containerd forget the snapshotter, if the one that runs knows it.
func (r *registrar) unload(ctx context.Context) error {
	if r.process == nil || r.running.Exports == nil {
		return nil
	}
	_, err := r.again(ctx, func(c doctor.Containerd) bool { return c.Err == nil && c.Exports == nil })
	return err
}

// again restarts containerd and waits until it is as it should be. Containers go on: their shims are no part of containerd.
func (r *registrar) again(ctx context.Context, done func(doctor.Containerd) bool) (doctor.Containerd, error) {
	command, err := r.command(ctx)
	if err != nil {
		return doctor.Containerd{}, codedError{fmt.Errorf("containerd has to be restarted by hand: %w", err), ExitRestart}
	}
	r.say("restarting containerd (pid %d) by %q; containers go on meanwhile", r.process.pid, strings.Join(command, " "))
	if err := r.run(ctx, command); err != nil {
		return doctor.Containerd{}, codedError{fmt.Errorf("containerd has to be restarted by hand: %w", err), ExitRestart}
	}
	ctx, cancel := context.WithTimeout(ctx, r.Wait)
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		c := doctor.AskContainerd(ctx, r.Containerd, r.Name)
		if done(c) {
			r.say("containerd %s is back (pid %d)", c.Version, c.PID)
			return c, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			err := c.Err
			if err == nil {
				err = errors.New("it runs, but has not read its configuration again")
			}
			return c, codedError{fmt.Errorf("containerd is not back as it should be after %s: %w", r.Wait, err), ExitRestart}
		}
	}
}

// command is what restarts containerd.
func (r *registrar) command(ctx context.Context) ([]string, error) {
	if !r.Restart {
		return nil, errors.New("--restart=false")
	}
	if r.RestartCommand != "" {
		return []string{"/bin/sh", "-c", r.RestartCommand}, nil
	}
	unit := r.process.unit()
	if unit == "" {
		return nil, errors.New("it is no service of systemd, and no --restart-command is given")
	}
	mode, err := exec.CommandContext(ctx, "systemctl", "show", "--property=KillMode", "--value", unit).Output()
	if err != nil {
		return nil, fmt.Errorf("ask systemd for %s: %w", unit, err)
	}
	if m := strings.TrimSpace(string(mode)); m != "process" && m != "none" {
		return nil, fmt.Errorf("%s has KillMode=%s, with which a restart would end every container of the node; containerd's own unit has KillMode=process", unit, m)
	}
	return []string{"systemctl", "restart", unit}, nil
}

func (r *registrar) run(ctx context.Context, command []string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...) //nolint:gosec // the administrator's own
	cmd.Env = append(os.Environ(), "CONTAINERD_PID="+strconv.Itoa(r.process.pid))
	cmd.WaitDelay = time.Second // for what it has left in the background with our pipe
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err, lastLine(string(out)))
	}
	return nil
}

// worse says whether a plugin fails that did not before.
func worse(before, after doctor.Containerd) error {
	for id, fault := range after.Plugins {
		if fault != "" && before.Plugins[id] == "" {
			return fmt.Errorf("containerd is back, but its plugin %s does not start: %s; run unregister to take it back", id, fault)
		}
	}
	return nil
}
