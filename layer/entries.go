package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// prepare makes room for a new entry, removing an earlier one at the same place. A directory stays if a directory is to come.
func (x *extractor) prepare(d *dir, base string, kind uint32) (merge bool, err error) {
	key := pathKey{d.path, base}
	if err := x.arrive(key); err != nil {
		return false, err
	}
	if !x.mark(key) {
		return false, nil
	}
	var st unix.Stat_t
	if err := unix.Fstatat(d.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		return false, refuseErrno("stat", err)
	}
	old := st.Mode & unix.S_IFMT
	if old == unix.S_IFDIR && kind == unix.S_IFDIR {
		return true, nil
	}
	return false, x.remove(d, base, old)
}

func (x *extractor) directory(d *dir, m meta, e *entry) error {
	base := e.base
	merge, err := x.prepare(d, base, unix.S_IFDIR)
	if err != nil {
		return err
	}
	if !merge {
		if err := unix.Mkdirat(d.fd, base, m.mode); err != nil {
			return refuseErrno("make directory", err)
		}
		x.inodes++
	}
	made, target, err := x.tree.step(d, base, false)
	if err != nil || made == nil {
		return fmt.Errorf("open new directory (%q): %w", target, err)
	}
	defer made.release()
	delete(x.implicit, made.path)
	n, err := m.applyTo(made.fd)
	if err != nil {
		return err
	}
	x.bytes += n
	x.tree.remember(e.name, made)
	x.dirTimes = append(x.dirTimes, dirTime{made.path, m.atime, m.mtime})
	return x.keepText(made.path)
}

func (x *extractor) symlink(d *dir, m meta, e *entry) error {
	base := e.base
	target, err := e.linkTarget()
	if err != nil {
		return err
	}
	if _, err := x.prepare(d, base, unix.S_IFLNK); err != nil {
		return err
	}
	if err := unix.Symlinkat(target, d.fd, base); err != nil {
		return refuseErrno("make symbolic link", err)
	}
	x.inodes++
	return m.applyAt(d, base, unix.S_IFLNK)
}

// hardlink links to an earlier file of the layer. Like containerd it then applies the link's own header to the shared inode.
func (x *extractor) hardlink(d *dir, m meta, e *entry) error {
	base := e.base
	clean, err := e.hardlinkTarget()
	if err != nil {
		return err
	}
	parent, tbase := path.Split(clean)
	td, err := x.tree.lookup(strings.TrimSuffix(parent, "/"), failMissing)
	if errors.Is(err, unix.ENOENT) {
		return e.hardlinkBelow()
	} else if err != nil {
		return err
	}
	defer td.release()
	if err := x.arrive(pathKey{td.path, tbase}); err != nil {
		return err
	}
	if td.path == d.path && tbase == base {
		return refuse("hard link to itself")
	}
	if _, err := x.prepare(d, base, unix.S_IFREG); err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Fstatat(td.fd, tbase, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return e.hardlinkBelow()
	case err != nil:
		return refuseErrno("hard link", err)
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return refuse("hard link to %q, which is a directory", e.Linkname)
	}
	if err := unix.Linkat(td.fd, tbase, d.fd, base, 0); err != nil {
		return refuseErrno("hard link", err)
	}
	return m.applyAt(d, base, st.Mode&unix.S_IFMT)
}

func (x *extractor) special(d *dir, m meta, e *entry) error {
	base := e.base
	kind, dev, err := e.device()
	if err != nil {
		return err
	}
	if _, err := x.prepare(d, base, kind); err != nil {
		return err
	}
	if err := unix.Mknodat(d.fd, base, kind|m.mode, int(dev)); err != nil {
		return refuseErrno("make device", err)
	}
	x.inodes++
	return m.applyAt(d, base, kind)
}

// whiteout hides something of the lower layers, in overlayfs's way.
func (x *extractor) whiteout(d *dir, e *entry) error {
	if e.base == opaque {
		if err := unix.Fsetxattr(d.fd, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
			return fmt.Errorf("make directory opaque: %w", err)
		}
		return nil
	}
	hidden, err := e.hidden()
	if err != nil {
		return err
	}
	m, err := metaOf(e.Header)
	if err != nil {
		return err
	}
	key := pathKey{d.path, hidden}
	if err := x.arrive(key); err != nil {
		return err
	}
	x.mark(key)
	if err := unix.Mknodat(d.fd, hidden, unix.S_IFCHR, 0); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return refuse("white-out of what the layer itself holds")
		}
		return refuseErrno("white-out", err)
	}
	x.inodes++
	if err := unix.Fchownat(d.fd, hidden, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("change owner of white-out: %w", err)
	}
	return nil
}

// regular hands a file to the writers: whole if it is small, in chunks as it comes if it is large.
func (x *extractor) regular(d *dir, m meta, e *entry) error {
	if _, err := x.prepare(d, e.base, unix.S_IFREG); err != nil {
		return err
	}
	if e.sparse() {
		return x.sparse(d, e.base, m, e.Size)
	}
	f := file{entry: e.Name, dir: d, base: e.base, meta: m}
	if e.Size > blockSize {
		return x.large(f, e.Size)
	}
	for i, left := 0, e.Size; left > 0; i++ {
		if i == len(f.parts) { // blocks are not full where frames of zstd or LZ4 are small
			return x.large(f, left)
		}
		data, b, err := x.r.take(left)
		if err != nil {
			return short(err)
		}
		f.parts[i] = chunk{data, b}
		left -= int64(len(data))
	}
	return x.submit(f)
}

// submit adds a small file to the batch.
func (x *extractor) submit(f file) error {
	f.dir.retain()
	key := pathKey{f.dir.path, f.base}
	x.batch.files = append(x.batch.files, f)
	x.batch.keys = append(x.batch.keys, key)
	x.pending[key] = x.batch
	if len(x.batch.files) >= batchFiles {
		return x.flush()
	}
	return nil
}

// large hands over a file before its content is there, and then the content.
func (x *extractor) large(f file, size int64) error {
	if err := x.flush(); err != nil {
		return err
	}
	chunks := make(chan chunk, 4)
	x.batch.chunks = chunks
	if err := x.submit(f); err != nil {
		return err
	}
	if err := x.flush(); err != nil {
		return err
	}
	for left := size; left > 0; {
		data, b, err := x.r.take(left)
		if err != nil {
			return short(err)
		}
		left -= int64(len(data))
		x.clock.pause()
		select {
		case chunks <- chunk{data, b}:
		case <-x.ctx.Done():
			return x.ctx.Err()
		}
		x.clock.resume()
	}
	close(chunks)
	return nil
}

// sparse writes a file with holes. They are rare, so the parser does it alone.
func (x *extractor) sparse(d *dir, base string, m meta, size int64) error {
	x.logical += size
	if err := x.p.bounded(x.logical); err != nil {
		return err
	}
	fd, err := createFile(d, base, m.mode)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, size); err != nil {
		return fmt.Errorf("set size: %w", err)
	}
	buf := make([]byte, 64<<10)
	for at := int64(0); ; {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(x.tr, buf)
		if !zero(buf[:n]) {
			if werr := pwriteAll(fd, buf[:n], at); werr != nil {
				return werr
			}
		}
		at += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF && at == size {
			break
		} else if err != nil {
			return &refusal{reason: "its sparse content", err: err}
		}
	}
	n, err := m.applyTo(fd)
	if err != nil {
		return err
	}
	x.bytes += n
	x.inodes++
	return setTimes(fd, m.atime, m.mtime)
}

// zero tells a hole.
func zero(data []byte) bool {
	return len(data) == 0 || data[0] == 0 && bytes.Equal(data[1:], data[:len(data)-1])
}

func pwriteAll(fd int, data []byte, at int64) error {
	for len(data) > 0 {
		n, err := unix.Pwrite(fd, data, at)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		data, at = data[n:], at+int64(n)
	}
	return nil
}
