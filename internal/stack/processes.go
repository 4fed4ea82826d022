package stack

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

// marker is the variable in the environment of every child, and so of the shims that containerd starts, that says whose they are.
const marker = "HEARTH_STACK"

// markedProcesses are the living processes that bear the marker of the Run folder. A process's first environment cannot be
// mistaken for another's, as a recorded pid can.
func markedProcesses(run string) []int {
	environs, _ := filepath.Glob("/proc/[0-9]*/environ")
	var out []int
	for _, path := range environs {
		data, err := os.ReadFile(path)
		if err != nil || !hasVariable(data, marker+"="+run) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil && pid != os.Getpid() {
			out = append(out, pid)
		}
	}
	return out
}

func hasVariable(environ []byte, variable string) bool {
	for v := range bytes.SplitSeq(environ, []byte{0}) {
		if string(v) == variable {
			return true
		}
	}
	return false
}

// isDaemon and isShim tell who starts things from who only keeps them.
func isDaemon(pid int) bool { return !isShim(pid) }
func isShim(pid int) bool   { return strings.Contains(processName(pid), "containerd-shim") }

// processName is a process's command line, for people.
func processName(pid int) string {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil || len(data) == 0 {
		return strconv.Itoa(pid)
	}
	words := strings.Split(string(data), "\x00")
	return fmt.Sprintf("%d (%s)", pid, filepath.Base(words[0]))
}

// endMarked ends the marked processes that want chooses: politely, and after the grace for good. It returns when there is none
// left, or ctx is done.
func endMarked(ctx context.Context, run string, grace time.Duration, want func(pid int) bool) error {
	deadline := time.Now().Add(grace)
	signal := unix.SIGTERM
	told := map[int]unix.Signal{}
	for {
		pids := slices.DeleteFunc(markedProcesses(run), func(pid int) bool { return !want(pid) })
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			signal = unix.SIGKILL
		}
		for _, pid := range pids {
			if told[pid] != signal {
				told[pid] = signal
				_ = unix.Kill(pid, signal)
			}
		}
		if !host.Pause(ctx, 20*time.Millisecond) {
			return fmt.Errorf("processes do not end: %s", strings.Join(processNames(pids), ", "))
		}
	}
}

func processNames(pids []int) []string {
	out := make([]string, len(pids))
	for i, pid := range pids {
		out[i] = processName(pid)
	}
	return out
}
