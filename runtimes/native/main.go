// Command loader is that of the native Runtime: there is nothing to boot, so it waits for a Function's program and becomes it:
// same process, same namespaces, same cgroup. docs/RUNTIMES.md is the contract that it keeps.
//
// It uses nothing but the standard library, and little of it: every warm Instance has one in memory.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

const (
	protocol = 1
	maxLine  = 1 << 20
	control  = 3 // where the control socket goes, from descriptor 0
)

// request is what nodeagent asks; one field is set.
type request struct {
	Load   *load     `json:"load"`
	Thawed *struct{} `json:"thawed"`
}

type load struct {
	Code    string            `json:"code"`
	Handler string            `json:"handler"`
	Env     map[string]string `json:"env"`
}

type failed struct {
	Error string `json:"error"`
	Trace string `json:"trace"`
}

// errMalformed is of a connection that is not worth going on with; another may come.
var errMalformed = errors.New("not of the protocol")

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() { // process 1 has no default action
		<-stop
		os.Exit(0)
	}()
	if err := takeControl(); err != nil {
		fmt.Fprintln(os.Stderr, "hearth: control socket:", err)
		os.Exit(1)
	}
	for {
		fd, _, err := syscall.Accept4(control, syscall.SOCK_CLOEXEC)
		if errors.Is(err, syscall.EINTR) || errors.Is(err, syscall.ECONNABORTED) {
			continue
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "hearth: control socket:", err)
			os.Exit(1)
		}
		conn := os.NewFile(uintptr(fd), "control")
		if err := converse(conn); err != nil {
			fmt.Fprintln(os.Stderr, "hearth: control:", err)
		}
		_ = conn.Close()
	}
}

// takeControl moves the control socket away from descriptor 0, where the program would find it.
func takeControl() error {
	if err := syscall.Dup3(0, control, syscall.O_CLOEXEC); err != nil {
		return err
	}
	if err := syscall.SetNonblock(control, false); err != nil {
		return err
	}
	null, err := syscall.Open(os.DevNull, syscall.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(null)
	return syscall.Dup3(null, 0, 0)
}

// converse ends with the connection, and with the process if a program was loaded or could not be.
func converse(conn io.ReadWriter) error {
	if err := say(conn, "ready", map[string]any{
		"protocol": protocol, "runtime": "native " + runtime.GOARCH, "loaded": false, "preloaded": []string{}, "missing": map[string]string{},
	}); err != nil {
		return err
	}
	for lines := bufio.NewReader(conn); ; {
		asked, err := read(lines)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case asked.Load != nil:
			err := asked.Load.execute(func() error { return say(conn, "executing", struct{}{}) })
			_ = say(conn, "failed", failed{Error: err.Error(), Trace: err.Error()}) // nobody else could be told
			fmt.Fprintln(os.Stderr, "hearth:", err)
			os.Exit(1)
		case asked.Thawed != nil:
			if err := say(conn, "resumed", struct{}{}); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%w: neither load nor thawed", errMalformed)
		}
	}
}

func say(w io.Writer, what string, v any) error {
	line, err := json.Marshal(map[string]any{what: v})
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// read returns the next request; io.EOF when the connection has ended, also in the middle of one.
func read(lines *bufio.Reader) (request, error) {
	var line []byte
	for {
		part, err := lines.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxLine {
			return request{}, fmt.Errorf("%w: a line of over 1 MiB", errMalformed)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return request{}, io.EOF
		}
	}
	var asked request
	if err := json.Unmarshal(line, &asked); err != nil {
		return request{}, fmt.Errorf("%w: %w", errMalformed, err)
	}
	return asked, nil
}

// execute becomes the program, and returns only if it cannot. It calls ready when nothing but the exec is left.
func (l load) execute(ready func() error) error {
	if err := os.Chdir(l.Code); err != nil {
		return fmt.Errorf("working directory: %w", err)
	}
	handler := l.Handler
	if handler == "" {
		handler = "main"
	}
	program := filepath.Join(l.Code, handler)
	if !strings.HasPrefix(program, filepath.Clean(l.Code)+"/") {
		return fmt.Errorf("handler %q: it is not below %s", l.Handler, l.Code)
	}
	info, err := os.Stat(program)
	if err != nil {
		return fmt.Errorf("handler %q: %w", l.Handler, err)
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("handler %q: %s is no program: make it executable", l.Handler, program)
	}
	for name, value := range l.Env {
		if err := os.Setenv(name, value); err != nil {
			return fmt.Errorf("environment variable %q: %w", name, err)
		}
	}
	if err := ready(); err != nil {
		return err
	}
	return fmt.Errorf("execute %s: %w", program, syscall.Exec(program, []string{program}, os.Environ()))
}
