package instance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// cgroupRoot is where every Linux of today mounts its cgroups.
const cgroupRoot = "/sys/fs/cgroup"

// cpuPeriod is the length, in microseconds, over which a CPU limit counts.
const cpuPeriod = 100_000

// cgroups knows where an Instance's cgroups are: PARENT/pod-ID holds the sandbox's and the Function's, in every hierarchy, and those
// of the workers that share the pod. Where the kubelet makes pods, it has made that cgroup too.
type cgroups struct {
	root   string // where they are mounted: cgroupRoot
	parent string
	learnt *podGroups // by pod; nil where we make them ourselves
}

func (c cgroups) pod(id string) string {
	if path := c.learnt.of(id); path != "" {
		return path
	}
	return filepath.Join(c.parent, "pod-"+id)
}

func (c cgroups) function(m member) string {
	name := "fn"
	if m.pod != m.id {
		name += "-" + m.id
	}
	return c.below(m.pod, name)
}

// unified tells whether cgroup v2 alone is mounted.
func (c cgroups) unified() bool {
	_, err := os.Stat(filepath.Join(c.root, "cgroup.controllers"))
	return err == nil
}

// swaps tells whether the swap that a cgroup takes can be limited by itself: with version 2, and a kernel that knows of swap.
func (c cgroups) swaps() bool {
	_, err := os.Stat("/proc/swaps")
	return err == nil && c.unified()
}

// directories lists the directories of one cgroup, one per hierarchy, of those that exist.
func (c cgroups) directories(path string) ([]string, error) {
	if c.unified() {
		return existing(filepath.Join(c.root, path))
	}
	hierarchies, err := os.ReadDir(c.root)
	if err != nil {
		return nil, fmt.Errorf("list cgroup hierarchies: %w", err)
	}
	var found []string
	for _, h := range hierarchies {
		if h.Type()&fs.ModeSymlink != 0 { // cpu → cpu,cpuacct on some distributions
			continue
		}
		dirs, err := existing(filepath.Join(c.root, h.Name(), path))
		if err != nil {
			return nil, err
		}
		found = append(found, dirs...)
	}
	return found, nil
}

func existing(dir string) ([]string, error) {
	_, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at cgroup %s: %w", dir, err)
	}
	return []string{dir}, nil
}

// remove removes an Instance's cgroup and all below it, with the processes that are still there: those that nobody else knows
// of, because whoever made them was killed before he could tell (runc, a shim). It waits at most killTime for their end.
func (c cgroups) remove(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	for delay := time.Millisecond; ; delay = min(2*delay, 50*time.Millisecond) {
		err := c.removeEmpty(path)
		if !errors.Is(err, syscall.EBUSY) {
			return err
		}
		if err := c.kill(path); err != nil {
			return err
		}
		if !sleep(ctx, delay) {
			return err
		}
	}
}

// kill sends SIGKILL to all processes of a cgroup and of those below it. What a freezer holds is thawed, or it would not die.
func (c cgroups) kill(path string) error {
	dirs, err := c.directories(path)
	if err != nil {
		return err
	}
	for _, top := range dirs {
		err := filepath.WalkDir(top, func(dir string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || err == nil && !entry.IsDir() {
				return nil
			}
			if err != nil {
				return err
			}
			return killIn(dir)
		})
		if err != nil {
			return fmt.Errorf("kill what is in cgroup %s: %w", path, err)
		}
	}
	return nil
}

// killIn kills the processes of one directory. Version 2 does it at once; with version 1 each is held by a descriptor while it is
// looked whether it is still there, so that nobody is hit who has got its number since.
func killIn(dir string) error {
	for _, order := range [][2]string{{"cgroup.kill", "1"}, {"freezer.state", v1Thawed}} {
		if err := writeCgroup(filepath.Join(dir, order[0]), order[1]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	inside, err := processesIn(dir)
	if err != nil {
		return err
	}
	for _, pid := range inside {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has ended
		}
		still, err := processesIn(dir)
		if err == nil && slices.Contains(still, pid) {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // if it fails it has ended
		}
		_ = unix.Close(fd)
	}
	return nil
}

// processesIn lists a cgroup's processes, without those below it.
func processesIn(dir string) ([]int, error) {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) { // it is being removed
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var pids []int
	for field := range strings.FieldsSeq(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 { // 0 is one of another PID namespace
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// removeEmpty removes a cgroup and what is empty below it. One that still holds processes is an error.
func (c cgroups) removeEmpty(path string) error {
	dirs, err := c.directories(path)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		children, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("list cgroup %s: %w", dir, err)
		}
		for _, child := range children {
			if child.IsDir() {
				if err := rmdir(filepath.Join(dir, child.Name())); err != nil {
					return err
				}
			}
		}
		if err := rmdir(dir); err != nil {
			return err
		}
	}
	return nil
}

// rmdir is os.Remove by the one system call: files of a cgroup are not removed and need not be.
func rmdir(dir string) error {
	if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}

// limit sets a Function's memory limit and its share of CPU under contention, before its process is executed.
func (c cgroups) limit(m member, r *hearthv1.Resources) error {
	if bytes := r.GetMemoryBytes(); bytes > 0 {
		if err := c.set(m, "memory", "memory.limit_in_bytes", "memory.max", strconv.FormatInt(bytes, 10)); err != nil {
			return fmt.Errorf("limit memory of %s: %w", m.id, err)
		}
		if c.swaps() {
			if err := writeCgroup(filepath.Join(c.root, c.function(m), "memory.swap.max"), strconv.FormatInt(bytes, 10)); err != nil {
				return fmt.Errorf("limit swap of %s: %w", m.id, err)
			}
		}
	}
	if millis := r.GetCpuMillis(); millis > 0 {
		shares := min(max(millis*1024/1000, 2), 262144) // what the kernel takes
		value := shares
		if c.unified() {
			value = 1 + (shares-2)*9999/262142 // as runc and systemd translate it
		}
		if err := c.set(m, "cpu", "cpu.shares", "cpu.weight", strconv.FormatInt(value, 10)); err != nil {
			return fmt.Errorf("share of cpu of %s: %w", m.id, err)
		}
	}
	return nil
}

// set writes a setting of a Function's cgroup: file1 of a hierarchy of version 1, or file2.
func (c cgroups) set(m member, hierarchy, file1, file2, value string) error {
	return writeCgroup(c.file(m, hierarchy, file1, file2), value)
}

// limitCPU sets a Function's CPU limit, in thousandths of a core. It is set when the Function serves and not before, because a
// start that is held to half a core takes twice as long.
func (c cgroups) limitCPU(m member, millis int64) error {
	value := strconv.FormatInt(max(millis*cpuPeriod/1000, 1000), 10) // the kernel takes no less than 1 ms
	if c.unified() {
		value += " " + strconv.Itoa(cpuPeriod)
	}
	if err := c.set(m, "cpu", "cpu.cfs_quota_us", "cpu.max", value); err != nil {
		return fmt.Errorf("limit cpu of %s: %w", m.id, err)
	}
	return nil
}
