package layer

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// file is a regular file to be written. It holds references to its directory and to the blocks of its content.
type file struct {
	entry string // as the tar names it, for errors
	dir   *dir
	base  string
	meta  meta
	parts [2]chunk // the beginning, or all of it
}

// chunk is a piece of a file's content with a reference to the block it lies in.
type chunk struct {
	data  []byte
	block *block
}

// batch is files handed over together: either small ones with all their content, or one whose content follows in chunks.
type batch struct {
	files  []file
	keys   []pathKey
	chunks chan chunk    // nil for small files
	done   chan struct{} // closed when all of it is written
}

// writer writes the files that the parser hands over. Several run side by side.
type writer struct {
	clock         clock
	bytes, inodes int64
}

func (w *writer) run(ctx context.Context, x *extractor) error {
	w.clock.start()
	defer w.clock.stop()
	for {
		w.clock.pause()
		var b *batch
		var ok bool
		select {
		case b, ok = <-x.jobs:
		case <-ctx.Done():
			return ctx.Err()
		}
		w.clock.resume()
		if !ok {
			return nil
		}
		for i := range b.files {
			if err := ctx.Err(); err != nil {
				return err
			}
			f := &b.files[i]
			n, err := w.write(ctx, f, b.chunks)
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				return corruptEntry(x.p.spec.Digest, f.entry, err)
			}
			w.bytes += n
			w.inodes++
			f.dir.release()
		}
		close(b.done)
	}
}

func (w *writer) write(ctx context.Context, f *file, chunks <-chan chunk) (bytes int64, err error) {
	fd, err := createFile(f.dir, f.base, f.meta.mode)
	if err != nil {
		return 0, err
	}
	defer func() {
		if cerr := unix.Close(fd); err == nil && cerr != nil {
			err = fmt.Errorf("close: %w", cerr)
		}
	}()
	for _, c := range f.parts {
		if c.block == nil {
			break
		}
		if err := writeAll(fd, c.data); err != nil {
			return 0, err
		}
		c.block.release()
	}
	if chunks != nil {
		if err := w.stream(ctx, fd, chunks); err != nil {
			return 0, err
		}
	}
	if bytes, err = f.meta.applyTo(fd); err != nil {
		return 0, err
	}
	return bytes, setTimes(fd, f.meta.atime, f.meta.mtime)
}

// stream writes a large file while it is still being unpacked.
func (w *writer) stream(ctx context.Context, fd int, chunks <-chan chunk) error {
	for {
		w.clock.pause()
		var c chunk
		var ok bool
		select {
		case c, ok = <-chunks:
		case <-ctx.Done():
			ok = true
		}
		w.clock.resume()
		if !ok {
			return nil
		}
		if c.block == nil {
			return ctx.Err()
		}
		if err := writeAll(fd, c.data); err != nil {
			return err
		}
		c.block.release()
	}
}

// createFile makes a regular file that must not exist.
func createFile(d *dir, base string, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(d.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode&0o777)
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return -1, refuseErrno("create", err)
		}
	}
}

func writeAll(fd int, data []byte) error {
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		data = data[n:]
	}
	return nil
}
