package instance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// cgroupRoot is where every Linux of today mounts its cgroups.
const cgroupRoot = "/sys/fs/cgroup"

// cpuPeriod is the length, in microseconds, over which a CPU limit counts.
const cpuPeriod = 100_000

// cgroups knows where an Instance's cgroups are: PARENT/pod-ID holds the sandbox's and the Function's, in every hierarchy, and those
// of the workers that share the pod.
type cgroups struct {
	root   string // where they are mounted: cgroupRoot
	parent string
}

func (c cgroups) pod(id string) string { return filepath.Join(c.parent, "pod-"+id) }

func (c cgroups) function(m member) string {
	if m.pod == m.id {
		return filepath.Join(c.pod(m.pod), "fn")
	}
	return filepath.Join(c.pod(m.pod), "fn-"+m.id)
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

// remove removes a cgroup and what is empty below it. One that still holds processes is an error.
func (c cgroups) remove(path string) error {
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
