package stack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CgroupParent is the cgroup, as a path from the top of each hierarchy, below which the Instances of a deployment are.
func CgroupParent(name string) string { return "/hearth-" + name }

// cgroupRoots are the deployment's folders in all cgroup hierarchies of this machine, those that exist.
func cgroupRoots(name string) ([]string, error) {
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, point := range cgroupMounts(mounts) {
		dir := filepath.Join(point, CgroupParent(name))
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

func cgroupProcesses(dir string) []int {
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

// removeCgroups kills what still runs in the deployment's cgroups and removes them, until none is left or ctx is done.
func removeCgroups(ctx context.Context, name string) error {
	for {
		roots, err := cgroupRoots(name)
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
		if !pause(ctx, 10*time.Millisecond) {
			return fmt.Errorf("remove cgroups of %s: %w", name, last)
		}
	}
}

// thawAndKill ends all processes of one cgroup; those that are frozen have to be thawed to die. Files of the other cgroup
// version do not exist, and need not.
func thawAndKill(dir string) {
	pids := cgroupProcesses(dir)
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

// pause waits a moment, and says whether ctx allows another attempt.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
