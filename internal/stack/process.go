package stack

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// errEnded stands for a child that ended without an error of its own.
var errEnded = errors.New("ended by itself")

// maxLogBytes is the size at which a log is set aside, as NAME.log.1, when its daemon starts.
const maxLogBytes = 16 << 20

// command is how a daemon is started.
type command struct {
	program string
	args    []string
	env     []string
	log     string // file that gets its output
}

type process struct{ cmd *exec.Cmd }

// start runs the command in a session of its own: the keys that interrupt a terminal reach the supervisor only.
func (c command) start() (child, error) {
	out, err := openLog(c.log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	// No context bounds its life: the keeper does.
	cmd := &exec.Cmd{
		Path: c.program, Args: append([]string{c.program}, c.args...), Env: c.env, Dir: "/", Stdout: out, Stderr: out,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return process{cmd}, nil
}

func (p process) pid() int    { return p.cmd.Process.Pid }
func (p process) wait() error { return p.cmd.Wait() }
func (p process) stop()       { _ = p.cmd.Process.Signal(syscall.SIGTERM) }
func (p process) kill()       { _ = p.cmd.Process.Kill() }

func openLog(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLogBytes {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, fmt.Errorf("set log aside: %w", err)
		}
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}

// childEnv is this process's environment for children: marked, with the tools before all else on the PATH, and without what
// would be meant for one daemon only or send traces away.
func (c Config) childEnv(environ []string) []string {
	drop := []string{"HEARTH_CONFIG", "HEARTH_ADMIN_ADDRESS", "HEARTH_NAME", "HEARTH_ROOT", marker, "NOTIFY_SOCKET", "OTEL_TRACES_EXPORTER", "PATH"}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	var out []string
next:
	for _, v := range environ {
		if p, ok := strings.CutPrefix(v, "PATH="); ok {
			path = p + ":/usr/sbin:/sbin"
		}
		for _, d := range drop {
			if strings.HasPrefix(v, d+"=") {
				continue next
			}
		}
		out = append(out, v)
	}
	return append(out, marker+"="+c.Run, "PATH="+c.Tools+":"+path, "OTEL_TRACES_EXPORTER=none")
}

// tail is the end of a log, for an error message.
func tail(path string, lines int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
