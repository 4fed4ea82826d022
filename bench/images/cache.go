package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a process that waits for another's build looks again.
const lockPoll = 200 * time.Millisecond

// cached returns the path of the cache entry of that name and key. If there is none, make is called with an empty folder
// to fill, which becomes the entry by one rename once make has succeeded, and is removed otherwise. A symbolic link with
// the bare name leads to the entry that was asked for last.
func (b *builder) cached(ctx context.Context, name, key string, make func(dir string) error) (string, error) {
	unlock, err := b.lock(ctx, name)
	if err != nil {
		return "", err
	}
	defer unlock()
	entry := filepath.Join(b.dir, name+"-"+key)
	if _, err := os.Stat(entry); errors.Is(err, os.ErrNotExist) {
		if err := b.fill(ctx, name, entry, make); err != nil {
			return "", err
		}
	} else if err != nil {
		return "", err
	}
	return entry, b.point(name, entry)
}

// fill makes one entry. The caller holds the name's lock.
func (b *builder) fill(ctx context.Context, name, entry string, make func(dir string) error) error {
	prefix := "." + name + "-building-"
	stale, err := filepath.Glob(filepath.Join(b.dir, prefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range stale { // left by a process that was killed: the lock is ours now
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(b.dir, prefix)
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }() // nothing is left to remove once dir was renamed
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if err := make(dir); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return os.Rename(dir, entry)
}

// point makes the link with the bare name lead to entry.
func (b *builder) point(name, entry string) error {
	link, target := filepath.Join(b.dir, name), filepath.Base(entry)
	if now, err := os.Readlink(link); err == nil && now == target {
		return nil
	}
	fresh := filepath.Join(b.dir, "."+name+".link")
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, fresh); err != nil {
		return err
	}
	return os.Rename(fresh, link)
}

// lock keeps other processes, and other calls in this one, from building what has the same name. It waits until ctx ends.
func (b *builder) lock(ctx context.Context, name string) (unlock func(), err error) {
	file, err := os.OpenFile(filepath.Join(b.dir, "."+name+".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for waited := false; ; waited = true {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = file.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = file.Close()
			return nil, fmt.Errorf("lock %s: %w", file.Name(), err)
		}
		if !waited {
			b.progress(name + ": waiting for another process that builds it ...")
		}
		select {
		case <-ctx.Done():
			_ = file.Close()
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}
