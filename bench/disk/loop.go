package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// attach makes a block device of a file, with direct I/O. The device is gone when nobody has it open or mounted any more, and so
// leaves nothing behind that would have to be found.
func attach(file string) (*os.File, error) {
	backing, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	config := &unix.LoopConfig{Fd: uint32(backing.Fd())}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	copy(config.Info.File_name[:len(config.Info.File_name)-1], file)
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err == nil {
			if err = unix.IoctlLoopConfigure(int(device.Fd()), config); err == nil {
				return device, checkDirect(device)
			}
			_ = device.Close()
		}
		// Another process may have taken it, or it has no node yet.
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, os.ErrNotExist) || time.Now().After(end) {
			return nil, fmt.Errorf("make a loop device of %s: %w", file, err)
		}
	}
}

// checkDirect makes sure of direct I/O, which the kernel leaves out where it cannot be had.
func checkDirect(device *os.File) error {
	data, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device.Name()), "loop/dio"))
	if err == nil && strings.TrimSpace(string(data)) != "1" {
		err = errors.New("direct I/O cannot be had on this file system: what is read would come from the page cache")
	}
	if err != nil {
		return errors.Join(fmt.Errorf("loop device %s: %w", device.Name(), err), device.Close())
	}
	return nil
}
