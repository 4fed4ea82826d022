package register

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/doctor"
)

// process is the containerd that runs, as /proc shows it.
type process struct {
	pid  int
	name string // argv[0]: some binaries are several programs
	exe  string // a link to its binary, even if another has been installed since
	args []string
	cwd  string
}

// find is the process of a containerd that answers. It fails if that is in a pid namespace that cannot be seen from here.
func find(c doctor.Containerd) (*process, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return nil, fmt.Errorf("own pid namespace: %w", err)
	}
	if c.PID == 0 || c.PIDNamespace != st.Ino {
		return nil, errors.New("containerd is in another pid namespace: run this on the node, or in a pod with hostPID: true")
	}
	dir := "/proc/" + strconv.Itoa(c.PID)
	line, err := readBounded(dir + "/cmdline")
	if err != nil {
		return nil, fmt.Errorf("containerd's command line: %w", err)
	}
	cwd, err := os.Readlink(dir + "/cwd")
	if err != nil {
		return nil, fmt.Errorf("containerd's folder: %w", err)
	}
	p := &process{pid: c.PID, name: "containerd", exe: dir + "/exe", cwd: cwd}
	if words := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00"); words[0] != "" {
		p.name, p.args = words[0], words[1:]
	}
	return p, nil
}

// config is the configuration that the process was told to read, or what it reads if it was told nothing.
func (p *process) config() string {
	for i, arg := range p.args {
		value, found := "", false
		for _, flag := range []string{"--config", "-config", "-c", "--c"} {
			if v, ok := strings.CutPrefix(arg, flag+"="); ok {
				value, found = v, true
			}
			if arg == flag && i+1 < len(p.args) {
				value, found = p.args[i+1], true
			}
		}
		if found && value != "" {
			if !filepath.IsAbs(value) {
				value = filepath.Join(p.cwd, value)
			}
			return filepath.Clean(value)
		}
	}
	return defaultConfig
}

// unit is the systemd service that the process runs in; empty if it runs in none.
func (p *process) unit() string {
	data, err := readBounded("/proc/" + strconv.Itoa(p.pid) + "/cgroup")
	if err != nil {
		return ""
	}
	return unitOf(string(data))
}

// unitOf reads a /proc/PID/cgroup: systemd's own hierarchy, or the one of version 2.
func unitOf(cgroups string) string {
	for line := range strings.Lines(cgroups) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 || fields[1] != "" && fields[1] != "name=systemd" {
			continue
		}
		parts := strings.Split(fields[2], "/")
		for i := len(parts) - 1; i >= 0; i-- { // a service may have cgroups of its own below the unit's
			if name := parts[i]; strings.HasSuffix(name, ".service") && !strings.ContainsAny(name, " \t'\"$;&|") && !strings.HasPrefix(name, "-") {
				return name
			}
		}
	}
	return ""
}

// enter executes this program again in the mount namespace of containerd, unless it is there. It does not return if it does.
func (p *process) enter() error {
	theirs := "/proc/" + strconv.Itoa(p.pid) + "/ns/mnt"
	var here, there unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/ns/mnt", &here), unix.Stat(theirs, &there)); err != nil {
		return fmt.Errorf("containerd's mount namespace: %w", err)
	}
	if here.Ino == there.Ino && here.Dev == there.Dev {
		return nil
	}
	namespace, err := os.Open(theirs)
	if err != nil {
		return fmt.Errorf("containerd's mount namespace: %w", err)
	}
	defer namespace.Close()
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("own program: %w", err)
	}
	defer self.Close()
	runtime.LockOSThread() // for good: what follows cannot be taken back
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("enter containerd's mount namespace: %w", err)
	}
	if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter containerd's mount namespace: %w; run as root on the node, or in a privileged pod", err)
	}
	err = unix.Exec("/proc/self/fd/"+strconv.Itoa(int(self.Fd())), os.Args, os.Environ())
	return fmt.Errorf("execute %s in containerd's mount namespace: %w", os.Args[0], err)
}
