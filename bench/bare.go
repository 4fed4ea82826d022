package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/bench/images"
)

// bareProgram is an image's program in a plain tree, which it is confined to by chroot alone.
type bareProgram struct {
	program images.Program
	root    string
}

func unpackBare(ctx context.Context, layout, parent string) (*bareProgram, error) {
	b := &bareProgram{root: filepath.Join(parent, "bare")}
	if err := os.Mkdir(b.root, 0o755); err != nil {
		return nil, fmt.Errorf("unpack the bare program: %w", err)
	}
	var err error
	if b.program, err = images.Unpack(ctx, layout, b.root); err != nil {
		return nil, err
	}
	proc := filepath.Join(b.root, "proc")
	if err := os.MkdirAll(proc, 0o755); err != nil {
		return nil, fmt.Errorf("unpack the bare program: %w", err)
	}
	if err := unix.Mount("proc", proc, "proc", 0, ""); err != nil { // java finds its libraries through it
		return nil, fmt.Errorf("mount %s: %w", proc, err)
	}
	return b, nil
}

func (b *bareProgram) remove() error {
	return errors.Join(unix.Unmount(filepath.Join(b.root, "proc"), 0), os.RemoveAll(b.root))
}

// firstByte starts the program, asks it until it answers, ends it, and returns the time from before its start to the first
// byte.
func (b *bareProgram) firstByte(ctx context.Context) (time.Duration, error) {
	address, err := freeAddress()
	if err != nil {
		return 0, err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	cmd := exec.Cmd{
		Path: b.resolve(b.program.Args[0]), Args: b.program.Args, Env: append(b.program.Env, "PORT="+port),
		Dir: "/" + b.program.Dir, SysProcAttr: &syscall.SysProcAttr{Chroot: b.root, Setpgid: true},
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", b.program.Args[0], err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if err := awaitListener(ctx, address, awaitPause); err != nil {
		return 0, err
	}
	client := newClient()
	defer client.CloseIdleConnections()
	asked := time.Now()
	took, _, err := firstByte(ctx, client, "http://"+address+"/", nil)
	return asked.Sub(start) + took, err
}

// resolve finds a program within the tree as the PATH of its image does.
func (b *bareProgram) resolve(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for _, env := range b.program.Env {
		dirs, ok := strings.CutPrefix(env, "PATH=")
		if !ok {
			continue
		}
		for dir := range strings.SplitSeq(dirs, ":") {
			if _, err := os.Lstat(filepath.Join(b.root, dir, name)); err == nil {
				return filepath.Join(dir, name)
			}
		}
	}
	return name
}

// awaitPause is so short that what it adds to the measured time is lost in the noise.
const awaitPause = 500 * time.Microsecond

// awaitListener asks until somebody listens.
func awaitListener(ctx context.Context, address string, every time.Duration) error {
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("await the program on %s: %w", address, err)
		case <-time.After(every):
		}
	}
}
