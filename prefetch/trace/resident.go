package trace

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// residentStep is how much of a file is looked at by one call, which answers with a byte for each page.
	residentStep = 256 << 20
	// residentMost is how much of a file is looked at in all.
	residentMost = 4 << 30
)

// resident calls each with the runs of pages that are in memory.
func (o *opened) resident(each func(first, pages uint64)) error {
	fd, err := unix.Open(o.path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: o.path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Dev != o.device || st.Ino != o.inode {
		return fmt.Errorf("%s is another file now", o.path)
	}
	for at := int64(0); at < min(st.Size, residentMost); at += residentStep {
		if err := residentPart(fd, at, min(st.Size-at, residentStep), each); err != nil {
			return fmt.Errorf("look for %s in memory: %w", o.path, err)
		}
	}
	return nil
}

func residentPart(fd int, at, length int64, each func(first, pages uint64)) error {
	m, err := unix.Mmap(fd, at, int(length), unix.PROT_NONE, unix.MAP_SHARED)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	defer unix.Munmap(m)
	size := int64(os.Getpagesize())
	states := make([]byte, (length+size-1)/size)
	if err := mincore(m, states); err != nil {
		return os.NewSyscallError("mincore", err)
	}
	for i := 0; i < len(states); {
		n := 0
		for i+n < len(states) && states[i+n]&1 != 0 {
			n++
		}
		if n > 0 {
			each(uint64(at/size)+uint64(i), uint64(n))
		}
		i += n + 1
	}
	return nil
}

// mincore says of each page of a mapping, in its lowest bit, whether it is in memory.
func mincore(area, states []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&area[0])), uintptr(len(area)), uintptr(unsafe.Pointer(&states[0])))
	if errno != 0 {
		return errno
	}
	return nil
}
