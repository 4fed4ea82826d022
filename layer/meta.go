package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// meta is what an entry says about an inode, as the system calls want it.
type meta struct {
	mode         uint32 // permissions with setuid, setgid and sticky
	uid, gid     int
	atime, mtime unix.Timespec
	xattrs       []xattr
}

type xattr struct{ name, value string }

const xattrRecord = "SCHILY.xattr."

func metaOf(hdr *tar.Header) (meta, error) {
	for _, id := range []int{hdr.Uid, hdr.Gid} {
		if id < 0 || id >= math.MaxUint32 {
			return meta{}, refuse("owner %d:%d does not exist", hdr.Uid, hdr.Gid)
		}
	}
	m := meta{mode: uint32(hdr.Mode & 0o7777), uid: hdr.Uid, gid: hdr.Gid, mtime: timespec(hdr.ModTime)}
	m.atime = m.mtime
	if hdr.AccessTime.After(hdr.ModTime) {
		m.atime = timespec(hdr.AccessTime)
	}
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrRecord)
		// containerd does not let a layer set trusted attributes, which steer overlayfs.
		if ok && !strings.HasPrefix(name, "trusted.") {
			m.xattrs = append(m.xattrs, xattr{name, value})
		}
	}
	return m, nil
}

// timespec gives a time as the kernel takes it; what a 64-bit count of nanoseconds since 1970 cannot hold is 1970.
func timespec(t time.Time) unix.Timespec {
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, math.MaxInt64)) {
		return unix.Timespec{}
	}
	return unix.NsecToTimespec(t.UnixNano())
}

// applyTo sets everything but the times of an open file or directory, and gives its usage on disk. Owner comes first, since
// changing it drops capabilities and setuid. What is right already costs nothing.
func (m *meta) applyTo(fd int) (bytes int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("stat: %w", err)
	}
	if st.Uid != uint32(m.uid) || st.Gid != uint32(m.gid) {
		if err := unix.Fchown(fd, m.uid, m.gid); err != nil {
			return 0, fmt.Errorf("change owner: %w", err)
		}
		st.Mode = math.MaxUint32 // it may have lost setuid
	}
	for _, x := range m.xattrs {
		if err := xattrError(x, unix.Fsetxattr(fd, x.name, []byte(x.value), 0), false); err != nil {
			return 0, err
		}
	}
	if st.Mode&0o7777 != m.mode || st.Mode == math.MaxUint32 || len(m.xattrs) > 0 { // an ACL changes the mode
		if err := unix.Fchmod(fd, m.mode); err != nil {
			return 0, fmt.Errorf("change mode: %w", err)
		}
	}
	return st.Blocks * 512, nil
}

// applyAt sets everything of something that cannot be opened, by its name in a directory. It never follows a symbolic link,
// and kind, the S_IFMT of what is there, says whether it is one: those have no mode.
func (m *meta) applyAt(d *dir, base string, kind uint32) error {
	if err := unix.Fchownat(d.fd, base, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("change owner: %w", err)
	}
	if len(m.xattrs) > 0 {
		special := kind != unix.S_IFREG && kind != unix.S_IFDIR
		name := "/proc/self/fd/" + strconv.Itoa(d.fd) + "/" + base
		for _, x := range m.xattrs {
			if err := xattrError(x, unix.Lsetxattr(name, x.name, []byte(x.value), 0), special); err != nil {
				return err
			}
		}
	}
	if kind != unix.S_IFLNK {
		if err := unix.Fchmodat(d.fd, base, m.mode, 0); err != nil {
			return fmt.Errorf("change mode: %w", err)
		}
	}
	return setTimesAt(d.fd, base, m.atime, m.mtime)
}

// xattrError forgives what containerd forgives: attributes that the file system has no room for in its model.
func xattrError(x xattr, err error, special bool) error {
	switch {
	case err == nil, errors.Is(err, unix.ENOTSUP):
		return nil
	case special && errors.Is(err, unix.EPERM) && strings.HasPrefix(x.name, "user."):
		return nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.E2BIG):
		return &refusal{reason: fmt.Sprintf("extended attribute %q", x.name), err: err}
	default:
		return fmt.Errorf("set extended attribute %q: %w", x.name, err)
	}
}

func setTimesAt(fd int, base string, atime, mtime unix.Timespec) error {
	if err := unix.UtimesNanoAt(fd, base, []unix.Timespec{atime, mtime}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// setTimes is futimens(2), which x/sys does not wrap: utimensat without a path.
func setTimes(fd int, atime, mtime unix.Timespec) error {
	ts := [2]unix.Timespec{atime, mtime}
	_, _, errno := syscall.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("set times: %w", errno)
	}
	return nil
}
