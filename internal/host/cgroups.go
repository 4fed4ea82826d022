package host

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
	"time"

	"golang.org/x/sys/unix"
)

// Cgroups are the folders of a cgroup, given as a path from the top, in all hierarchies of this machine that have it.
func Cgroups(path string) ([]string, error) {
	mounts, err := Mounts(MountInfo)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, point := range CgroupMounts(mounts) {
		dir := filepath.Join(point, path)
		if _, err := os.Stat(dir); err == nil {
			out = append(out, dir)
		}
	}
	return out, nil
}

// cgroupTree lists a cgroup and all below it, deepest first.
func cgroupTree(root string) []string {
	var out []string
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			out = append([]string{path}, out...)
		}
		return nil // what vanishes meanwhile is gone, as wanted
	})
	return out
}

// Processes are the ids of those in the one cgroup whose folder this is.
func Processes(dir string) []int {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var out []int
	for _, field := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
			out = append(out, pid)
		}
	}
	return out
}

// MakeCgroup makes a cgroup in every hierarchy of this machine, and returns its folders. Processes can be put into it at once:
// it may use the processors and the memory that the groups above it may.
func MakeCgroup(path string) ([]string, error) {
	mounts, err := Mounts(MountInfo)
	if err != nil {
		return nil, err
	}
	// Where version 1 has the controllers, version 2 only sorts processes, and is left as it is.
	only2 := !slices.ContainsFunc(mounts, func(m Mount) bool { return m.Kind == "cgroup" })
	var out []string
	for _, point := range CgroupMounts(mounts) {
		dir := point
		for _, name := range strings.Split(strings.Trim(path, "/"), "/") {
			if only2 {
				delegate(dir)
			}
			dir = filepath.Join(dir, name)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, fmt.Errorf("make cgroup: %w", err)
			}
			if err := inheritSets(dir); err != nil {
				return nil, fmt.Errorf("make cgroup: %w", err)
			}
		}
		out = append(out, dir)
	}
	return out, nil
}

// delegate lets the cgroups below one of version 2 be limited in all that it is itself; in version 1 the hierarchy says that. What
// the kernel refuses, who needs it will miss with a better reason.
func delegate(dir string) {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, name := range strings.Fields(string(controllers)) { // one by one: a single one that is refused would take all others with it
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0o600)
	}
}

// inheritSets gives a new cgroup of version 1's cpuset what the one above it has; by itself it would have nothing.
func inheritSets(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		own, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || strings.TrimSpace(string(own)) != "" {
			continue // another hierarchy, or made before
		}
		above, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err != nil || strings.TrimSpace(string(above)) == "" {
			continue // version 2, where nothing written means the same as above
		}
		if err := os.WriteFile(filepath.Join(dir, name), above, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// RemoveCgroup kills what still runs in a cgroup and below it, and removes all of them, until none is left or ctx is done.
func RemoveCgroup(ctx context.Context, path string) error {
	for {
		roots, err := Cgroups(path)
		if err != nil || len(roots) == 0 {
			return err
		}
		var last error
		for _, root := range roots {
			for _, dir := range cgroupTree(root) {
				thawAndKill(dir)
				if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					last = err
				}
			}
		}
		if last == nil {
			continue
		}
		if !Pause(ctx, 10*time.Millisecond) {
			return fmt.Errorf("remove cgroup %s: %w", path, last)
		}
	}
}

// thawAndKill ends all processes of one cgroup; those that are frozen have to be thawed to die. Files of the other cgroup
// version do not exist, and need not.
func thawAndKill(dir string) {
	pids := Processes(dir)
	if len(pids) == 0 {
		return
	}
	for file, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0", "cgroup.kill": "1"} {
		if f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0); err == nil {
			_, _ = f.WriteString(value)
			_ = f.Close()
		}
	}
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// Pause waits a moment, and says whether ctx allows another attempt.
func Pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
