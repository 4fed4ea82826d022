package stack

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is a line of /proc/self/mountinfo.
type mount struct {
	point, kind, super string // mount point, type of file system, its options
}

func readMounts(path string) ([]mount, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	var out []mount
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if m, ok := parseMount(lines.Text()); ok {
			out = append(out, m)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return out, nil
}

// parseMount reads "ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAGS...] - TYPE SOURCE SUPEROPTIONS", see proc_pid_mountinfo(5).
func parseMount(line string) (mount, bool) {
	left, right, ok := strings.Cut(line, " - ")
	before, after := strings.Fields(left), strings.Fields(right)
	if !ok || len(before) < 6 || len(after) < 1 {
		return mount{}, false
	}
	m := mount{point: unescape(before[4]), kind: after[0]}
	if len(after) > 2 {
		m.super = after[2]
	}
	return m, true
}

// unescape undoes the kernel's \040 for a blank, and the like.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// cgroupMounts are the mount points of cgroup hierarchies, of either version.
func cgroupMounts(mounts []mount) []string {
	var out []string
	for _, m := range mounts {
		if m.kind == "cgroup" || m.kind == "cgroup2" {
			out = append(out, m.point)
		}
	}
	return out
}

// mountsWithin lists what is mounted strictly below the given folders, last mounted first. A folder that is itself a mount
// point is its owner's affair.
func mountsWithin(mounts []mount, dirs ...string) []string {
	var out []string
	for i := len(mounts) - 1; i >= 0; i-- {
		for _, dir := range dirs {
			if strings.HasPrefix(mounts[i].point, dir+"/") {
				out = append(out, mounts[i].point)
				break
			}
		}
	}
	return out
}

// unmountAll detaches everything that is mounted below the given folders.
func unmountAll(dirs ...string) error {
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var problems []error
	for _, point := range mountsWithin(mounts, dirs...) {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			problems = append(problems, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	return errors.Join(problems...)
}

// realDirs resolves symbolic links as mountinfo shows paths; folders that are not there stay as they are.
func realDirs(dirs ...string) []string {
	out := make([]string, len(dirs))
	for i, dir := range dirs {
		out[i] = dir
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			out[i] = real
		}
	}
	return out
}
