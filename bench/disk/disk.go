// Package disk makes file systems for benchmarks of what is read: new ext4 ones, on the machine's disk or on one whose reads take as
// long as those of a disk that a benchmark is about.
//
// Such a slow disk is a loop device over a file that a FUSE server of our own serves. The device does direct I/O, so that every
// request which the file system sends to its disk is one request to the server, and nothing between them keeps what was read. The
// server has the file in memory, and answers when a disk of that speed would: see Speed. Writes take the time they take. A limit
// on the cgroup would slow reads down in all, but not each of them, and a disk's latency is what most small reads wait for.
//
// The server is a process of its own (Serve), so that no page that it needs is one that waits for it to be written.
package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// imageBytes is the size of the sparse file, which takes only what is written.
	imageBytes = 24 << 30
	// prefix of the folders that all of a disk is in, by which those of a run that was killed are found.
	prefix = "hearth-disk-"
	// Names in that folder: who has the lock uses the disk, the file that the file system is in, and mount points of the file system,
	// of the server and of its memory.
	lockName, imageName, mountName, servedName, memoryName = "lock", "image", "fs", "served", "memory"
)

// Disk is a mounted file system on a disk of its own, until Close.
type Disk struct {
	// Dir is where it is mounted.
	Dir string

	home   string
	device string // name of the block device
	lock   *os.File
	server *server // nil on the machine's own disk
}

// New makes a disk of a speed. Its files go to a new folder of parent; that must lie on the machine's disk if the speed is the
// machine's own, and takes little otherwise, when all is in memory. serve is the command that runs Serve. What runs that were
// killed have left in parent is removed first. Needs root.
func New(ctx context.Context, parent string, speed Speed, serve ...string) (_ *Disk, err error) {
	if err := Sweep(parent); err != nil {
		return nil, err
	}
	home, err := os.MkdirTemp(parent, prefix)
	if err != nil {
		return nil, fmt.Errorf("make a disk: %w", err)
	}
	d := &Disk{Dir: filepath.Join(home, mountName), home: home}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make a disk: %w", err), d.Close())
		}
	}()
	if d.lock, err = takeLock(home); err != nil {
		return nil, err
	}
	for _, name := range []string{mountName, servedName, memoryName} {
		if err := os.Mkdir(filepath.Join(home, name), 0o711); err != nil {
			return nil, err
		}
	}
	image := filepath.Join(home, imageName)
	if speed != (Speed{}) {
		image = filepath.Join(home, servedName, imageName)
		if err := d.serve(ctx, speed, serve); err != nil {
			return nil, err
		}
	} else if err := makeImage(image); err != nil {
		return nil, err
	}
	return d, d.mount(ctx, image)
}

// serve starts the server over a file in memory.
func (d *Disk) serve(ctx context.Context, speed Speed, command []string) (err error) {
	memory := filepath.Join(d.home, memoryName)
	if err := unix.Mount("hearth-bench", memory, "tmpfs", 0, "size=80%,mode=0700"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", memory, err)
	}
	if err := makeImage(filepath.Join(memory, imageName)); err != nil {
		return err
	}
	d.server, err = startServer(ctx, d.home, speed, command)
	return err
}

// makeImage makes the sparse file of a disk.
func makeImage(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(imageBytes), f.Close())
}

// mount makes the file system in a file, and mounts it.
func (d *Disk) mount(ctx context.Context, image string) error {
	device, err := attach(image)
	if err != nil {
		return err
	}
	defer device.Close() // once it is mounted, the mount alone keeps it; else it is gone
	mkfs := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", device.Name())
	mkfs.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := mkfs.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	if err := unix.Mount(device.Name(), d.Dir, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", device.Name(), d.Dir, err)
	}
	d.device = filepath.Base(device.Name())
	kib := []byte(readAheadKiB)
	if d.server == nil {
		kib = readAheadBelow(image)
	}
	if err := os.WriteFile(d.ReadAheadFile(), kib, 0); err != nil {
		return fmt.Errorf("set the kernel's read-ahead: %w", err)
	}
	return nil
}

// ReadAheadFile has in it how many KiB the kernel may read ahead of this disk: of a slow one as many as it does of most disks when
// nobody says otherwise, of the machine's as many as of the disk that this one is on.
func (d *Disk) ReadAheadFile() string {
	return filepath.Join("/sys/block", d.device, "queue/read_ahead_kb")
}

// readAheadBelow is how much the kernel reads ahead of the disk that a file is on.
func readAheadBelow(file string) []byte {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err == nil {
		at := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
		for _, queue := range []string{"/queue", "/../queue"} { // a disk's own, a partition's
			if kib, err := os.ReadFile(at + queue + "/read_ahead_kb"); err == nil {
				return kib
			}
		}
	}
	return []byte(readAheadKiB) // the file system is on no one disk
}

// Close unmounts all that is mounted below the disk's folder, ends the server and removes the files.
func (d *Disk) Close() error {
	err := Unmount(d.Dir)
	if d.server != nil {
		err = errors.Join(err, d.server.stop())
	}
	err = errors.Join(err, Unmount(d.home))
	if d.lock != nil {
		_ = d.lock.Close()
	}
	if err != nil {
		return fmt.Errorf("remove the disk in %s: %w", d.home, err)
	}
	return os.RemoveAll(d.home)
}

// ReadBytes is how much was read from the device since it was made.
func (d *Disk) ReadBytes() (int64, error) {
	data, err := os.ReadFile(filepath.Join("/sys/block", d.device, "stat"))
	if err != nil {
		return 0, fmt.Errorf("read what was read from %s: %w", d.Dir, err)
	}
	const sectorsRead, sectorBytes = 2, 512
	fields := strings.Fields(string(data))
	if len(fields) <= sectorsRead {
		return 0, fmt.Errorf("read what was read from %s: %q", d.Dir, data)
	}
	n, err := strconv.ParseInt(fields[sectorsRead], 10, 64)
	return n * sectorBytes, err
}

// Sweep removes disks of processes that ended without doing so.
func Sweep(parent string) error {
	homes, err := filepath.Glob(filepath.Join(parent, prefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, home := range homes {
		lock, err := takeLock(home)
		if err != nil {
			continue // it is in use, or gone
		}
		if err = detachAll(home); err == nil {
			err = os.RemoveAll(home)
		}
		_ = lock.Close()
		if err != nil {
			errs = append(errs, fmt.Errorf("remove the disk that was left in %s: %w", home, err))
		}
	}
	return errors.Join(errs...)
}

// takeLock holds the lock of a disk's folder until the file is closed, as it is when this process dies.
func takeLock(home string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(home, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
	}
	return f, nil
}

// readAheadKiB is Linux's default.
const readAheadKiB = "128"

// patience is how long a device or a server may take for what is to be instant.
const patience = 10 * time.Second
