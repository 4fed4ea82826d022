package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

// ErrRunning says that a supervisor has the deployment already.
var ErrRunning = errors.New("is up already")

// locks are what makes a supervisor the only one of its Root, its Run folder and its name. The kernel drops them with the process.
type locks struct {
	files []*os.File
	name  net.Listener
}

// lookTime is how long at most somebody who only looks whether a lock is held (locked) is taken for one who holds it.
const lookTime = 200 * time.Millisecond

// lock takes all of them, or says who is in the way (ErrRunning) if he still is when the patience is over.
func (c Config) lock(ctx context.Context, patience time.Duration) (*locks, error) {
	patient, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		l, err := c.tryLock(ctx)
		if !errors.Is(err, ErrRunning) || !host.Pause(patient, 10*time.Millisecond) {
			return l, err
		}
	}
}

func (c Config) tryLock(ctx context.Context) (*locks, error) {
	l := &locks{}
	for _, path := range []string{c.paths().lock(), c.paths().rootLock()} {
		f, err := lockFile(path)
		if err != nil {
			l.release()
			return nil, err
		}
		l.files = append(l.files, f)
	}
	// A name in the abstract namespace of sockets: no file, gone with its process.
	name, err := new(net.ListenConfig).Listen(ctx, "unix", "@hearth-stack-"+c.Name)
	if err != nil {
		l.release()
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("a deployment of the name %s in other folders %w: choose another with --name", c.Name, ErrRunning)
		}
		return nil, fmt.Errorf("take the name %s: %w", c.Name, err)
	}
	l.name = name
	return l, nil
}

func (l *locks) release() {
	for _, f := range l.files {
		_ = f.Close()
	}
	if l.name != nil {
		_ = l.name.Close()
	}
}

func lockFile(path string) (*os.File, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("the deployment in %s %w: see `hearth status`, or end it with `hearth down`", dir, ErrRunning)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// locked says whether a process holds a lock file. For the moment of looking it holds it itself, together with others who look.
func locked(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// IsRoot says whether a folder has been the Root of a deployment.
func IsRoot(dir string) bool {
	_, err := os.Stat(paths{root: dir}.rootLock())
	return err == nil
}
