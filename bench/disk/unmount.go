package disk

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Unmount unmounts dir and all that is mounted below it, the latest first.
func Unmount(dir string) error { return unmountAll(dir, unmount) }

// detachAll is Unmount for what others may still use.
func detachAll(dir string) error {
	return unmountAll(dir, func(point string) error { return unix.Unmount(point, unix.MNT_DETACH) })
}

func unmountAll(dir string, unmount func(string) error) error {
	points, err := MountPoints()
	if err != nil {
		return err
	}
	for _, point := range slices.Backward(points) {
		if point != dir && !strings.HasPrefix(point, dir+"/") {
			continue
		}
		if err := unmount(point); err != nil {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	return nil
}

// unmount waits for who is about to leave: the kernel ends what was unmounted lazily, as images of layers are, in its own time, and
// on a busy machine that is after the call.
func unmount(point string) (err error) {
	const pause = 20 * time.Millisecond
	for end := time.Now().Add(patience); ; time.Sleep(pause) {
		if err = unix.Unmount(point, 0); !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
	}
}

// MountPoints of this namespace, the latest last.
func MountPoints() ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 {
			points = append(points, fields[4])
		}
	}
	return points, nil
}
