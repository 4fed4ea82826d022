package bench

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// clockTicks is the unit of times in /proc, a second's hundredth on every Linux that Go runs on.
const clockTicks = 100

// cpuSeconds that processes have spent, in user mode and in the kernel, with the children that they have waited for: a decompressor
// that one of them ran counts, and so does what the kernel did in a system call. What the kernel writes back later does not.
func cpuSeconds(pids []int) (float64, error) {
	ticks := int64(0)
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, fmt.Errorf("read the times of process %d: %w", pid, err)
		}
		_, after, _ := strings.Cut(string(data), ") ") // its name may have spaces
		fields := strings.Fields(after)
		const userTime, count = 11, 4 // utime, stime, cutime, cstime, as of the field after the name
		if len(fields) < userTime+count {
			return 0, fmt.Errorf("read the times of process %d: %q", pid, data)
		}
		for _, field := range fields[userTime : userTime+count] {
			n, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read the times of process %d: %w", pid, err)
			}
			ticks += n
		}
	}
	return float64(ticks) / clockTicks, nil
}

// written bytes of a process, to files and sockets alike.
func written(pid int) (float64, error) {
	n, err := strconv.ParseFloat(field(fmt.Sprintf("/proc/%d/io", pid), "wchar", ":"), 64)
	if err != nil {
		return 0, fmt.Errorf("read what process %d wrote: %w", pid, err)
	}
	return n, nil
}

// deviceWritten is how many bytes went to the device that dir is on. What waits in the page cache is not among them.
func deviceWritten(dir string) (float64, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", dir, err)
	}
	data, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return 0, fmt.Errorf("read what was written to %s: %w", dir, err)
	}
	const sectorsWritten, sectorBytes = 6, 512
	fields := strings.Fields(string(data))
	if len(fields) <= sectorsWritten {
		return 0, fmt.Errorf("read what was written to %s: %q", dir, data)
	}
	n, err := strconv.ParseFloat(fields[sectorsWritten], 64)
	return n * sectorBytes, err
}

// syncFS makes all of dir's file system durable, as `sync -f` does.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
