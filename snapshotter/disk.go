package snapshotter

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// makeDir makes a directory of exactly this mode, whatever the umask.
func makeDir(path string, mode fs.FileMode) error {
	if err := os.Mkdir(path, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// syncFile makes a file's content, or the names in a directory, durable.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(0)
}

// discard takes a directory out of sight at once, into trash/. Deleting it can take its time.
func discard(root, path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// A rename, and no new directory: on a full disk there is no room for one.
	if err := os.Rename(path, filepath.Join(root, "trash", rand.Text())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("discard %s: %w", path, err)
	}
	return nil
}

// emptyTrash deletes what was discarded. It may run twice at once.
func emptyTrash(root string) error {
	trash := filepath.Join(root, "trash")
	names, err := readNames(trash)
	if err != nil {
		return err
	}
	errs := make([]error, 0, len(names))
	for _, name := range names {
		errs = append(errs, removeTree(filepath.Join(trash, name)))
	}
	return errors.Join(errs...)
}

// lockRoot makes sure that one process uses a root. The kernel lets go of the lock with the process, however it ends.
func lockRoot(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is in use by another process: %w", root, err)
		}
		return nil, fmt.Errorf("lock %s: %w", root, err)
	}
	return f, nil
}

// syncer makes a file system durable, with one syncfs for all who ask while another is under way.
type syncer struct {
	dir  *os.File // any directory of the file system; kept open, for the kernel reports write errors once per open file
	turn chan struct{}

	mu   sync.Mutex // guards next
	next *syncRound // the round that has not begun
}

type syncRound struct {
	done chan struct{}
	err  error // set before done is closed
}

func newSyncer(root string) (*syncer, error) {
	d, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	return &syncer{dir: d, turn: make(chan struct{}, 1)}, nil
}

// sync returns when everything written before it was called is on the disk.
func (s *syncer) sync() error {
	s.mu.Lock()
	round := s.next
	if round != nil {
		s.mu.Unlock()
		<-round.done
		return round.err
	}
	round = &syncRound{done: make(chan struct{})}
	s.next = round
	s.mu.Unlock()

	s.turn <- struct{}{}
	s.mu.Lock()
	s.next = nil // who comes from now on might come too late for this round
	s.mu.Unlock()
	if err := unix.Syncfs(int(s.dir.Fd())); err != nil {
		round.err = fmt.Errorf("sync file system: %w", err)
	}
	<-s.turn
	close(round.done)
	return round.err
}

// tree makes a staged tree durable: an image by itself, whatever else waits to be written, and a directory by a sync for all.
func (s *syncer) tree(staged string) error {
	image, ok := imageOf(staged)
	if !ok {
		return s.sync()
	}
	for _, path := range []string{image, filepath.Join(staged, "layer.json"), staged} {
		if err := syncFile(path); err != nil {
			return fmt.Errorf("sync layer: %w", err)
		}
	}
	return nil
}

func (s *syncer) close() error { return s.dir.Close() }
