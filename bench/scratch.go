package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/bench/disk"
)

// scratch is a new ext4 file system in a sparse file. Each round of a benchmark takes a new one: on a file system where
// trees were unpacked and removed many times, making a file takes up to twenty times as long, which would measure the past.
type scratch struct {
	// Dir is where it is mounted.
	Dir  string
	file string
}

// scratchBytes is the size of the sparse file, which takes only what is written.
const scratchBytes = 12 << 30

// newScratch makes one under parent. parent on tmpfs makes it a disk in memory.
func newScratch(ctx context.Context, parent string) (*scratch, error) {
	dir, err := os.MkdirTemp(parent, "fs-")
	if err != nil {
		return nil, fmt.Errorf("make scratch file system: %w", err)
	}
	s := &scratch{Dir: dir, file: dir + ".img"}
	if err := s.format(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("make scratch file system: %w", err), s.remove())
	}
	return s, nil
}

func (s *scratch) format(ctx context.Context) error {
	f, err := os.Create(s.file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(scratchBytes); err != nil {
		return err
	}
	for _, argv := range [][]string{
		{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", s.file},
		{"mount", "-o", "loop,noatime,discard", s.file, s.Dir},
	} {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", argv[0], err, out)
		}
	}
	return nil
}

// remove unmounts the file system, with what a containerd left mounted in it, and deletes its file.
func (s *scratch) remove() error {
	if err := disk.Unmount(s.Dir); err != nil {
		return err
	}
	return errors.Join(ignoreMissing(os.Remove(s.file)), ignoreMissing(os.Remove(s.Dir)))
}

// mountsBelow are the mounts below dir, itself not among them.
func mountsBelow(dir string) (map[string]bool, error) {
	points, err := disk.MountPoints()
	below := map[string]bool{}
	for _, point := range points {
		if strings.HasPrefix(point, dir+"/") {
			below[point] = true
		}
	}
	return below, err
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// memoryDir mounts a tmpfs for scratch files below parent and returns it with its end.
func memoryDir(parent string) (dir string, end func() error, err error) {
	dir, err = os.MkdirTemp(parent, "memory-")
	if err != nil {
		return "", nil, fmt.Errorf("make memory folder: %w", err)
	}
	if err := unix.Mount("hearth-bench", dir, "tmpfs", 0, "size=80%,mode=0700"); err != nil {
		return "", nil, errors.Join(fmt.Errorf("mount tmpfs on %s: %w", dir, err), os.Remove(dir))
	}
	return dir, func() error {
		return errors.Join(unix.Unmount(dir, 0), os.Remove(filepath.Clean(dir)))
	}, nil
}
