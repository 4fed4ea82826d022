package prefetch

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mincore says of each page of a mapping whether it is in memory.
func mincore(area, present []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&area[0])), uintptr(len(area)), uintptr(unsafe.Pointer(&present[0])))
	if errno != 0 {
		return errno
	}
	return nil
}
