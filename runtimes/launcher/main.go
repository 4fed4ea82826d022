// Command launcher is process 1 of a container that was made before anyone knew what would run in it. It waits on a socket until
// it is told; by then the root file system around it has been exchanged for the Function's, and it executes the Function's
// process in its own place: same process, same namespaces, same cgroup.
//
// Whoever connects sends one JSON object, Process of package instance. The launcher answers with the reason if it cannot execute
// it and ends; otherwise the connection closes without a word, because it is not inherited. A connection that closes before it
// has said anything changes nothing: another may come.
//
// A Runtime's loader gets the socket itself, still listening, as its descriptor 0: no path inside the container leads to it.
//
// What it executes has no capability, and can get none: what the launcher has is for becoming its user.
//
// It uses nothing but the standard library, and little of it: every warm Instance has one in memory.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"unsafe"
)

// process is what to become.
type process struct {
	Args   []string `json:"args"`
	Env    []string `json:"env"`
	Cwd    string   `json:"cwd"`
	UID    int      `json:"uid"`
	GID    int      `json:"gid"`
	Groups []int    `json:"groups"`
	// Control is whether it gets the socket that this program listens on as its standard input.
	Control bool `json:"control"`
}

// backlog leaves room for connections of nodeagents that have ended while nobody accepted.
const backlog = 16

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: launcher SOCKET")
		os.Exit(2)
	}
	if err := rehearse(); err != nil {
		fmt.Fprintln(os.Stderr, "launcher:", err)
		os.Exit(1)
	}
	if err := serve(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "launcher:", err)
		os.Exit(1)
	}
}

// rehearse does ahead what it can of what a start waits for. This thread, whose bounding set is empty then, is the one that gives up
// its other capabilities and executes. What decoding needs is made once.
func rehearse() error {
	runtime.LockOSThread()
	if err := unbound(); err != nil {
		return err
	}
	return json.Unmarshal([]byte(`{"args":["x"],"env":["x=y"],"cwd":"/","uid":0,"gid":0,"groups":[0],"control":false}`), new(process))
}

// serve returns only if it fails.
func serve(path string) error {
	listener, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket: %w", err)
	}
	if err := syscall.Bind(listener, &syscall.SockaddrUnix{Name: path}); err != nil {
		return fmt.Errorf("bind %s: %w", path, err)
	}
	if err := syscall.Listen(listener, backlog); err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	for {
		fd, _, err := syscall.Accept4(listener, syscall.SOCK_CLOEXEC)
		if errors.Is(err, syscall.EINTR) || errors.Is(err, syscall.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", path, err)
		}
		conn := os.NewFile(uintptr(fd), path)
		if err := launch(conn, listener); err != nil {
			_, _ = io.WriteString(conn, err.Error()) // nobody else could be told
			return err
		}
		_ = conn.Close() // it was only read from
	}
}

// launch returns nil if the connection said nothing.
func launch(conn io.Reader, listener int) error {
	var p process
	err := json.NewDecoder(conn).Decode(&p)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read what to launch: %w", err)
	}
	if len(p.Args) == 0 {
		return errors.New("nothing to launch")
	}
	if err := enter(p); err != nil {
		return err
	}
	if err := renounce(); err != nil {
		return err
	}
	program, err := find(p)
	if err != nil {
		return err
	}
	if p.Control {
		if err := syscall.Dup3(listener, 0, 0); err != nil { // the copy is inherited
			return fmt.Errorf("pass the socket on: %w", err)
		}
	}
	if err := syscall.Exec(program, p.Args, p.Env); err != nil {
		return fmt.Errorf("execute %s: %w", program, err)
	}
	return nil
}

// enter becomes the user that the process runs as, in its directory, which is made if the image has none.
func enter(p process) error {
	if err := os.MkdirAll(p.Cwd, 0o755); err != nil {
		return fmt.Errorf("working directory: %w", err)
	}
	for fd := range 3 { // so that a process that is not root's can open /dev/stdout
		_ = syscall.Fchown(fd, p.UID, p.GID) // refused for /dev/null, which needs it not
	}
	if err := identify(p); err != nil {
		return err
	}
	if err := os.Chdir(p.Cwd); err != nil {
		return fmt.Errorf("working directory: %w", err)
	}
	return nil
}

// identify sets user and groups of this thread, and not of all as package syscall would, which has to stop them all three times:
// the others end when this one executes.
func identify(p process) error {
	groups := make([]uint32, len(p.Groups)+1) // it has an address also when there are none
	for i, g := range p.Groups {
		groups[i] = uint32(g)
	}
	_, _, errno := syscall.RawSyscall(syscall.SYS_SETGROUPS, uintptr(len(p.Groups)), uintptr(unsafe.Pointer(&groups[0])), 0)
	if errno != 0 {
		return fmt.Errorf("set groups %v: %w", p.Groups, errno)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETGID, uintptr(p.GID), 0, 0); errno != 0 {
		return fmt.Errorf("set group %d: %w", p.GID, errno)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETUID, uintptr(p.UID), 0, 0); errno != 0 {
		return fmt.Errorf("set user %d: %w", p.UID, errno)
	}
	return nil
}

// Of linux/prctl.h and linux/capability.h.
const (
	prCapbsetDrop        = 24
	prCapAmbient         = 47
	prCapAmbientClearAll = 4
	capabilityVersion3   = 0x20080522
	mostCapabilities     = 64
)

// unbound empties the bounding set of this thread, so that no program it executes gets a capability, whoever owns the file.
func unbound() error {
	for capability := range uintptr(mostCapabilities) {
		_, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prCapbsetDrop, capability, 0)
		if errno == syscall.EINVAL { // the kernel knows no more
			break
		}
		if errno != 0 {
			return fmt.Errorf("drop capability %d: %w", capability, errno)
		}
	}
	return nil
}

// renounce gives up the capabilities that this thread has.
func renounce() error {
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, prCapAmbient, prCapAmbientClearAll, 0, 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("clear ambient capabilities: %w", errno)
	}
	header := struct {
		version uint32
		pid     int32
	}{version: capabilityVersion3}
	var none [2]struct{ effective, permitted, inheritable uint32 }
	_, _, errno = syscall.RawSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none)), 0)
	if errno != 0 {
		return fmt.Errorf("give up capabilities: %w", errno)
	}
	return nil
}

// find looks the program up as a shell would, in the PATH that the process is to have.
func find(p process) (string, error) {
	for _, entry := range p.Env {
		if path, ok := strings.CutPrefix(entry, "PATH="); ok {
			if err := os.Setenv("PATH", path); err != nil {
				return "", fmt.Errorf("set PATH: %w", err)
			}
		}
	}
	program, err := exec.LookPath(p.Args[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", err
	}
	return program, nil
}
