//go:build !race

package relay

import (
	"syscall"
	"unsafe"
)

func sysRead(fd uintptr, b []byte) (int, syscall.Errno) { return rawTransfer(syscall.SYS_READ, fd, b) }

func sysWrite(fd uintptr, b []byte) (int, syscall.Errno) {
	return rawTransfer(syscall.SYS_WRITE, fd, b)
}

func rawTransfer(call, fd uintptr, b []byte) (int, syscall.Errno) {
	n, _, failed := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if failed != 0 {
		return 0, failed
	}
	return int(n), 0
}
