//go:build race

package relay

import (
	"errors"
	"syscall"
)

// The race detector knows of what package syscall does: that what was read has been written before.

func sysRead(fd uintptr, b []byte) (int, syscall.Errno) { return told(syscall.Read(int(fd), b)) }

func sysWrite(fd uintptr, b []byte) (int, syscall.Errno) { return told(syscall.Write(int(fd), b)) }

func told(n int, err error) (int, syscall.Errno) {
	if failed, ok := errors.AsType[syscall.Errno](err); ok {
		return 0, failed
	}
	return n, 0
}
