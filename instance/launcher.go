package instance

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Paths in a launcher's root file system.
const (
	launcherProgram  = "/launcher"
	logWriterProgram = "/logwriter" // which runs outside of it: it is here because this folder stays as long as an Instance is
	launcherControl  = "/control"   // of the directory with its socket, which is one of the Instance's
	launcherGraft    = "/function"  // where the Function's root file system is mounted for a moment
	launcherSocket   = "launch.sock"
)

const (
	// launcherTime bounds the wait for a launcher that was started to listen.
	launcherTime = 10 * time.Second
	// maxReason bounds what a launcher says of its failure.
	maxReason = 4 << 10
)

// writeLauncherRoot makes the root file system that all launchers and sidecars run in: the programs, by where they are to be, and
// places for mounts. It is named by all of that, so that those that run keep theirs.
func writeLauncherRoot(root string, programs map[string]string) (string, error) {
	content, texts := digest.Canonical.Digester(), map[string][]byte{}
	_, _ = fmt.Fprint(content.Hash(), carried)
	for _, place := range slices.Sorted(maps.Keys(programs)) {
		if programs[place] == "" {
			continue
		}
		text, err := os.ReadFile(programs[place])
		if err != nil {
			return "", fmt.Errorf("program of instances: %w; `make build` compiles it beside nodeagent", err)
		}
		_, _ = content.Hash().Write(text)
		texts[place] = text
	}
	dir := filepath.Join(root, "launcher-"+content.Digest().Encoded()[:16])
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	made, err := os.MkdirTemp(root, "launcher.")
	if err != nil {
		return "", fmt.Errorf("launcher: %w", err)
	}
	if err := fillLauncherRoot(made, texts); err != nil {
		return "", errors.Join(fmt.Errorf("launcher: %w", err), os.RemoveAll(made))
	}
	if err := os.Rename(made, dir); err != nil {
		return "", errors.Join(fmt.Errorf("launcher: %w", err), os.RemoveAll(made))
	}
	return dir, nil
}

// cleanLauncherRoots removes those of former versions when no Instance can be in one of them.
func (e *Engine) cleanLauncherRoots() error {
	if len(e.all()) > 0 || e.launcherRoot == "" {
		return nil
	}
	found, err := filepath.Glob(filepath.Join(e.cfg.Root, "launcher*"))
	for _, dir := range found {
		if dir != e.launcherRoot {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}
	return err
}

func fillLauncherRoot(dir string, programs map[string][]byte) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	for _, place := range []string{launcherControl, launcherGraft, "etc"} {
		if err := os.Mkdir(filepath.Join(dir, place), 0o755); err != nil {
			return err
		}
	}
	for _, m := range carried {
		path := filepath.Join(dir, m.path)
		if m.file {
			if err := os.WriteFile(path, nil, 0o644); err != nil {
				return err
			}
		} else if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
	}
	for place, text := range programs {
		if err := os.WriteFile(filepath.Join(dir, place), text, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// taskLauncher is the launcher of a real container.
type taskLauncher struct {
	pid       uint32
	control   string // directory of its socket
	conn      *net.UnixConn
	namespace *os.File // the container's mounts
}

// findLauncher connects to the launcher that is the process pid, if that is what it still is.
func findLauncher(ctx context.Context, pid uint32, control string) (*taskLauncher, error) {
	proc := "/proc/" + strconv.FormatUint(uint64(pid), 10)
	namespace, err := os.Open(namespacePath(pid, "mnt"))
	if err != nil {
		return nil, fmt.Errorf("launcher: %w", err)
	}
	conn, err := dialIn(ctx, control, launcherSocket)
	if err != nil {
		return nil, errors.Join(err, namespace.Close())
	}
	l := &taskLauncher{pid: pid, control: control, conn: conn, namespace: namespace}
	program, err := os.Stat(proc + "/root" + launcherProgram)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("launcher: it has another root: %w: %w", err, errdefs.ErrFailedPrecondition), l.Close())
	}
	runs, err := os.Stat(proc + "/exe")
	if err != nil || !os.SameFile(program, runs) {
		return nil, errors.Join(fmt.Errorf("launcher: it runs something else: %w", errdefs.ErrFailedPrecondition), l.Close())
	}
	return l, nil
}

// findLoader finds the loader that is the process pid.
func findLoader(_ context.Context, pid uint32, control string) (*taskLauncher, error) {
	namespace, err := os.Open(namespacePath(pid, "mnt"))
	if err != nil {
		return nil, fmt.Errorf("loader: %w", err)
	}
	return &taskLauncher{pid: pid, control: control, namespace: namespace}, nil
}

// Dial implements launcher. Whoever it was that listened first is who answers.
func (l *taskLauncher) Dial(ctx context.Context) (net.Conn, error) {
	conn, err := dialIn(ctx, l.control, launcherSocket)
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	raw, err := conn.SyscallConn()
	if err == nil {
		var inner error
		err = raw.Control(func(fd uintptr) { peer, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		err = errors.Join(err, inner)
	}
	if err == nil && uint32(peer.Pid) != l.pid {
		err = fmt.Errorf("process %d listens, not %d: %w", peer.Pid, l.pid, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("loader: %w", err), conn.Close())
	}
	return conn, nil
}

// awaitLauncher is findLauncher for one that was only just started.
func awaitLauncher(ctx context.Context, pid uint32, control string) (*taskLauncher, error) {
	ctx, cancel := context.WithTimeout(ctx, launcherTime)
	defer cancel()
	for delay := 2 * time.Millisecond; ; delay = min(2*delay, 50*time.Millisecond) {
		l, err := findLauncher(ctx, pid, control)
		if err == nil || !sleep(ctx, delay) {
			return l, err
		}
	}
}

// dialIn reaches a socket through its directory, because the path of a socket has at most 107 bytes.
func dialIn(ctx context.Context, control, socket string) (*net.UnixConn, error) {
	dir, err := os.OpenFile(control, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	defer dir.Close()
	path := "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + socket
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	return conn.(*net.UnixConn), nil
}

// process is what the launcher is told to become; see runtimes/launcher.
type process struct {
	Args   []string `json:"args"`
	Env    []string `json:"env"`
	Cwd    string   `json:"cwd"`
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups"`

	Control bool `json:"control"`
}

// Launch implements launcher.
func (l *taskLauncher) Launch(ctx context.Context, what launch) error {
	p := what.Process
	message, err := json.Marshal(process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd, UID: p.User.UID, GID: p.User.GID, Groups: p.User.AdditionalGids, Control: what.Loader,
	})
	if err != nil {
		return fmt.Errorf("launch: %w", err)
	}
	if what.Loader {
		if err := makeMountPoint(what.Root.Tree, strings.TrimPrefix(codePath, "/"), false); err != nil {
			return fmt.Errorf("place for %s: %w", codePath, err)
		}
	}
	cwd, err := makeDirs(what.Root.Tree, cmp.Or(strings.TrimPrefix(p.Cwd, "/"), ".")) // nobody can, once the root is read-only
	if err != nil {
		return fmt.Errorf("working directory %s: %w", p.Cwd, err)
	}
	_ = cwd.Close() // it is only a path
	attributes := uint64(unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_RDONLY)
	if what.Writable {
		attributes &^= unix.MOUNT_ATTR_RDONLY
	}
	if err := graft(l.namespace, what.Root.Tree, attributes); err != nil {
		return fmt.Errorf("root file system: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = l.conn.SetDeadline(time.Unix(1, 0)) })() // what waits ends; a closed one needs no end
	if _, err := l.conn.Write(message); err != nil {
		return fmt.Errorf("launch: %w", err)
	}
	reason, err := io.ReadAll(io.LimitReader(l.conn, maxReason))
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("launch: %w", ctx.Err())
	case len(reason) > 0:
		return fmt.Errorf("launch: %s", reason)
	case err != nil && !errors.Is(err, unix.ECONNRESET): // the process ended at once, before it had read all
		return fmt.Errorf("launch: %w", err)
	}
	return nil
}

// LimitTmp implements launcher.
func (l *taskLauncher) LimitTmp(bytes int64) error {
	err := inMountsOf(l.namespace, func() error { return resize(unix.AT_FDCWD, "/tmp", bytes) })
	if err != nil {
		return fmt.Errorf("limit /tmp: %w", err)
	}
	return nil
}

// Pid implements launcher.
func (l *taskLauncher) Pid() uint32 { return l.pid }

// Close implements launcher.
func (l *taskLauncher) Close() error {
	if l.conn == nil {
		return l.namespace.Close()
	}
	return errors.Join(l.conn.Close(), l.namespace.Close())
}
