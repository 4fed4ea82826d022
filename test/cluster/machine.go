package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

// machine is one of the cluster's: namespaces that a process, its holder, keeps, folders and cgroups.
type machine struct {
	name   string
	dir    string   // its folders, on the host
	cgroup string   // what it runs is in cgroups below this one
	tools  []string // folders with programs, first come first served; they are seen at the same paths inside
}

// holder is the name of the process, and of its cgroup, that keeps a machine's namespaces; unlike programs it does nothing.
const holder = "machine"

// ownFolders of a machine are seen below its root. The others there are the host's.
var ownFolders = []string{"etc", "opt", "run", "var"}

// boot makes the namespaces and starts their holder. Nothing is up in the network yet.
func (m machine) boot() error {
	if err := m.prepareFolders(); err != nil {
		return fmt.Errorf("machine %s: %w", m.name, err)
	}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS); err != nil {
			return fmt.Errorf("make namespaces: %w", err)
		}
		if err := unix.Sethostname([]byte(m.name)); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
		if err := m.buildRoot(); err != nil {
			return err
		}
		return m.start(program{name: holder, args: []string{"/bin/sleep", "infinity"}}, "/var/log/"+holder+".log")
	})
	if err != nil {
		return fmt.Errorf("machine %s: %w", m.name, err)
	}
	return nil
}

// prepareFolders makes what is seen inside. /run is empty at each boot; the rest stays, as on a disk.
func (m machine) prepareFolders() error {
	if err := os.RemoveAll(filepath.Join(m.dir, "run")); err != nil {
		return err
	}
	for _, dir := range []string{"root", "run/lock", "opt/cni/bin", "var/lib", "var/log", "var/tmp", "var/cache"} {
		if err := os.MkdirAll(filepath.Join(m.dir, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Symlink("/run", filepath.Join(m.dir, "var/run")); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return copyEtc("/etc", filepath.Join(m.dir, "etc"))
}

// copyEtc gives a machine the host's configuration, of which it may change what it likes; once, so that it keeps its changes.
func copyEtc(from, to string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	part := to + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if err := os.CopyFS(part, regular{os.DirFS(from).(fs.ReadLinkFS)}); err != nil {
		return fmt.Errorf("copy %s: %w", from, err)
	}
	return os.Rename(part, to)
}

// regular shows of a file system what can be copied, and nothing that a host's own containerd or Kubernetes has there.
type regular struct{ fs.ReadLinkFS }

func (r regular) ReadDir(name string) ([]fs.DirEntry, error) {
	entries, err := fs.ReadDir(r.ReadLinkFS, name)
	return slices.DeleteFunc(entries, func(e fs.DirEntry) bool {
		foreign := name == "." && slices.Contains([]string{"containerd", "cni", "kubernetes", "hearth", "shadow", "gshadow", "ssh"}, e.Name())
		return foreign || !e.IsDir() && !e.Type().IsRegular() && e.Type()&fs.ModeSymlink == 0
	}), err
}

// enter calls f in the machine's namespaces. What f starts runs there.
func (m machine) enter(f func() error) error {
	pid, err := m.holder()
	if err != nil {
		return err
	}
	return onThread(func() error {
		for _, ns := range []struct {
			name string
			kind int
		}{{"net", unix.CLONE_NEWNET}, {"uts", unix.CLONE_NEWUTS}, {"mnt", unix.CLONE_NEWNS}} {
			if err := join(pid, ns.name, ns.kind); err != nil {
				return fmt.Errorf("enter machine %s: %w", m.name, err)
			}
		}
		return f()
	})
}

func join(pid int, name string, kind int) error {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if kind == unix.CLONE_NEWNS {
		if err := unix.Unshare(unix.CLONE_FS); err != nil { // threads share a working directory, and who shares it may not join
			return err
		}
	}
	return unix.Setns(fd, kind)
}

// onThread calls f on a thread that ends with it, since it has come to be in other namespaces than all others. It is never the
// first one: that cannot end before the process, and what /proc/self tells is its.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			done <- f() // and the thread is never unlocked: so it ends
			return
		}
		defer runtime.UnlockOSThread()
		done <- onThread(f) // which cannot get this thread, as it is locked
	}()
	return <-done
}

// holder is the process whose namespaces are the machine's.
func (m machine) holder() (int, error) {
	if pids := m.processes(holder); len(pids) > 0 {
		return pids[0], nil
	}
	return 0, fmt.Errorf("machine %s is not up", m.name)
}

// processes are those of one program, its keeper first, and of what it has started in no cgroup of their own.
func (m machine) processes(name string) []int {
	dirs, _ := host.Cgroups(filepath.Join(m.cgroup, name))
	var out []int
	for _, dir := range dirs {
		out = append(out, host.Processes(dir)...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// program is what runs on a machine until it is stopped; when it ends by itself it is started again, as systemd would.
type program struct {
	name string // of its cgroup and its log
	args []string
}

// keep puts itself into the cgroups that its first argument lists, before there is anything else to put there, and keeps a
// program running.
const keep = `for g in $1; do echo $$ >"$g/cgroup.procs" || exit 1; done; shift
while :; do "$@"; echo "` + endedMark + `$?"; sleep 1; done`

// endedMark begins a line of a log that says that a program ended. It is nothing that a program would write itself.
const endedMark = "hearth-cluster: ended with status "

func (m machine) log(name string) string { return filepath.Join(m.dir, "var/log", name+".log") }

// run starts a program in the machine's namespaces.
func (m machine) run(p program) error {
	return m.enter(func() error { return m.start(p, "/var/log/"+p.name+".log") })
}

// start starts a program in the namespaces of the calling thread, which see the log at that path.
func (m machine) start(p program, log string) error {
	groups, err := host.MakeCgroup(filepath.Join(m.cgroup, p.name))
	if err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	defer out.Close()
	args := append([]string{"/bin/sh", "-c", keep, "keep", strings.Join(groups, " ")}, p.args...)
	if p.name == holder {
		args[2] = strings.Split(keep, "\n")[0] + `; exec "$@"`
	}
	// No context bounds its life: it is the machine's, and ends with it.
	cmd := &exec.Cmd{
		Path: args[0], Args: args, Dir: "/", Stdout: out, Stderr: out,
		Env:         []string{"PATH=" + m.path(), "HOME=/root"},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	// What this process was given open, a lock's file for one, is not for what outlives it.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	go func() { _ = cmd.Wait() }() // so that nothing dead remains in a test's process, which may live on
	return awaitJoined(cmd.Process.Pid, groups)
}

// awaitJoined waits until a keeper is where it can be found again.
func awaitJoined(pid int, groups []string) error {
	deadline := time.Now().Add(10 * time.Second)
	for _, dir := range groups {
		for !slices.Contains(host.Processes(dir), pid) {
			if time.Now().After(deadline) {
				return fmt.Errorf("process %d does not come into the cgroup %s", pid, dir)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// path is the PATH of what runs on the machine.
func (m machine) path() string {
	return strings.Join(append(slices.Clone(m.tools), "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"), ":")
}

// stop ends one program for good, and all that it started in its cgroup, at once.
func (m machine) stop(ctx context.Context, name string) error {
	return host.RemoveCgroup(ctx, filepath.Join(m.cgroup, name))
}

// restarts is how often a program has ended by itself.
func (m machine) restarts(name string) int {
	data, _ := os.ReadFile(m.log(name))
	return strings.Count(string(data), endedMark)
}

// lastLines is the end of a program's log, for an error.
func (m machine) lastLines(name string) string {
	const lines = 15
	data, err := os.ReadFile(m.log(name))
	if err != nil {
		return ""
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// nsenter is the command line by which a person, or a script, runs a command on the machine.
func (m machine) nsenter() ([]string, error) {
	pid, err := m.holder()
	if err != nil {
		return nil, err
	}
	return []string{"nsenter", "--mount", "--net", "--uts", "--target", strconv.Itoa(pid), "--", "/usr/bin/env", "PATH=" + m.path()}, nil
}
