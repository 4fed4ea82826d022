package bench

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/bench/disk"
)

// Machine says where a run took place.
type Machine struct {
	CPU         string `json:"cpu"`
	Cores       int    `json:"cores"`
	MemoryBytes int64  `json:"memory_bytes"`
	Kernel      string `json:"kernel"`
	OS          string `json:"os"`
	Go          string `json:"go"`
	// Disks that a suite was run on, by name, as they were when it began.
	Disks map[string]disk.Measured `json:"disks,omitempty"`
}

func (m *Machine) addDisk(name string, d disk.Measured) {
	if m.Disks == nil {
		m.Disks = map[string]disk.Measured{}
	}
	m.Disks[name] = d
}

// ThisMachine reads the machine's description; what cannot be read stays empty.
func ThisMachine() Machine {
	m := Machine{Cores: runtime.NumCPU(), Go: runtime.Version(), CPU: field("/proc/cpuinfo", "model name", ":")}
	m.OS = strings.Trim(field("/etc/os-release", "PRETTY_NAME", "="), `"`)
	if kib, err := strconv.ParseInt(strings.TrimSuffix(field("/proc/meminfo", "MemTotal", ":"), " kB"), 10, 64); err == nil {
		m.MemoryBytes = kib << 10
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	return m
}

// String is the line above a table.
func (m Machine) String() string {
	return fmt.Sprintf("%d cores (%s), %d GiB, Linux %s, %s, %s", m.Cores, m.CPU, (m.MemoryBytes+1<<29)>>30, m.Kernel, m.OS, m.Go)
}

// rest waits until the machine has little to do, so that a sample does not pay for what the one before it left behind: files,
// namespaces and cgroups are deleted by the kernel long after their deletion was asked for. A machine that others keep busy is
// waited for in vain, and not for long.
func rest(ctx context.Context) error {
	const window, patience, little = 200 * time.Millisecond, 5 * time.Second, 0.1
	before, err := cpuTimes()
	for end := time.Now().Add(patience); err == nil && time.Now().Before(end); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(window):
		}
		var now cpuTicks
		if now, err = cpuTimes(); err == nil && float64(now.busy-before.busy) <= little*float64(now.all-before.all) {
			return nil
		}
		before = now
	}
	return err
}

// cpuTicks that all cores have spent since the machine started.
type cpuTicks struct{ busy, all int64 }

func cpuTimes() (t cpuTicks, err error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return t, fmt.Errorf("read the machine's load: %w", err)
	}
	first, _, _ := strings.Cut(string(data), "\n")
	const idle, ioWait = 4, 5
	for i, field := range strings.Fields(first) {
		if i == 0 {
			continue // its name
		}
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return t, fmt.Errorf("read the machine's load: %w", err)
		}
		t.all += n
		if i != idle && i != ioWait {
			t.busy += n
		}
	}
	return t, nil
}

// field is the first value of a key in a file of KEY SEPARATOR VALUE lines.
func field(file, key, separator string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		k, v, ok := strings.Cut(line, separator)
		if ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
