package host

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

// MountInfo is where the kernel lists the mounts that the reader sees.
const MountInfo = "/proc/self/mountinfo"

// Mount is a line of MountInfo: where it is, which directory of the file system that is, the type of the file system, its options
// (not those of the mount), and its device as stat encodes it (of btrfs and the like, the device of no file).
type Mount struct {
	Point, Root, Kind, Options string
	Device                     uint64
}

// Mounts reads MountInfo, or a file like it; what is mounted later comes later.
func Mounts(path string) ([]Mount, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	var out []Mount
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if m, ok := ParseMount(lines.Text()); ok {
			out = append(out, m)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return out, nil
}

// ParseMount reads "ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAGS...] - TYPE SOURCE SUPEROPTIONS", see proc_pid_mountinfo(5).
func ParseMount(line string) (Mount, bool) {
	left, right, ok := strings.Cut(line, " - ")
	before, after := strings.Fields(left), strings.Fields(right)
	if !ok || len(before) < 6 || len(after) < 1 {
		return Mount{}, false
	}
	m := Mount{Point: unescape(before[4]), Root: unescape(before[3]), Kind: after[0]}
	if len(after) > 2 {
		m.Options = unescape(after[2])
	}
	major, minor, _ := strings.Cut(before[2], ":")
	a, errA := strconv.ParseUint(major, 10, 32)
	b, errB := strconv.ParseUint(minor, 10, 32)
	if errA == nil && errB == nil {
		m.Device = unix.Mkdev(uint32(a), uint32(b))
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

// CgroupMounts are the mount points of cgroup hierarchies, of either version.
func CgroupMounts(mounts []Mount) []string {
	var out []string
	for _, m := range mounts {
		if m.Kind == "cgroup" || m.Kind == "cgroup2" {
			out = append(out, m.Point)
		}
	}
	return out
}

// MountsWithin lists what is mounted strictly below the given folders, last mounted first. A folder that is itself a mount
// point is its owner's affair.
func MountsWithin(mounts []Mount, dirs ...string) []string {
	var out []string
	for i := len(mounts) - 1; i >= 0; i-- {
		for _, dir := range dirs {
			if strings.HasPrefix(mounts[i].Point, dir+"/") {
				out = append(out, mounts[i].Point)
				break
			}
		}
	}
	return out
}

// UnmountAll detaches everything that is mounted below the given folders.
func UnmountAll(dirs ...string) error {
	mounts, err := Mounts(MountInfo)
	if err != nil {
		return err
	}
	var problems []error
	for _, point := range MountsWithin(mounts, dirs...) {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			problems = append(problems, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	return errors.Join(problems...)
}

// RealDirs resolves symbolic links as mountinfo shows paths; folders that are not there stay as they are.
func RealDirs(dirs ...string) []string {
	out := make([]string, len(dirs))
	for i, dir := range dirs {
		out[i] = dir
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			out[i] = real
		}
	}
	return out
}
