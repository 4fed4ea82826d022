package prefetch_test

import (
	"syscall"
	"unsafe"
)

// mincore says of each page of a mapping whether it is in memory.
func mincore(area, present []byte) error {
	_, _, errno := syscall.Syscall(syscall.SYS_MINCORE, uintptr(unsafe.Pointer(&area[0])), uintptr(len(area)), uintptr(unsafe.Pointer(&present[0])))
	if errno != 0 {
		return errno
	}
	return nil
}
