package instance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// cgroupRoot is where every Linux of today mounts its cgroups.
const cgroupRoot = "/sys/fs/cgroup"

// cpuPeriod is the length, in microseconds, over which a CPU limit counts.
const cpuPeriod = 100_000

// cgroups knows where an Instance's cgroups are: PARENT/pod-ID holds the sandbox's and the Function's, in every hierarchy.
type cgroups struct{ parent string }

func (c cgroups) pod(instance string) string { return filepath.Join(c.parent, "pod-"+instance) }

func (c cgroups) function(instance string) string { return filepath.Join(c.pod(instance), "fn") }

// unified tells whether cgroup v2 alone is mounted.
func (cgroups) unified() bool {
	_, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers"))
	return err == nil
}

// directories lists the directories of one cgroup, one per hierarchy, of those that exist.
func (c cgroups) directories(path string) ([]string, error) {
	if c.unified() {
		return existing(filepath.Join(cgroupRoot, path))
	}
	hierarchies, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, fmt.Errorf("list cgroup hierarchies: %w", err)
	}
	var found []string
	for _, h := range hierarchies {
		if h.Type()&fs.ModeSymlink != 0 { // cpu → cpu,cpuacct on some distributions
			continue
		}
		dirs, err := existing(filepath.Join(cgroupRoot, h.Name(), path))
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

// remove removes an Instance's cgroup and what is empty below it. One that still holds processes is an error.
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

// limitCPU sets a Function's CPU limit, in thousandths of a core. It is set when the Function serves and not before, because a
// start that is held to half a core takes twice as long.
func (c cgroups) limitCPU(instance string, millis int64) error {
	quota := strconv.FormatInt(max(millis*cpuPeriod/1000, 1000), 10) // the kernel takes no less than 1 ms
	file, value := filepath.Join(cgroupRoot, "cpu", c.function(instance), "cpu.cfs_quota_us"), quota
	if c.unified() {
		file, value = filepath.Join(cgroupRoot, c.function(instance), "cpu.max"), quota+" "+strconv.Itoa(cpuPeriod)
	}
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		return fmt.Errorf("limit cpu of %s: %w", instance, err)
	}
	return nil
}
