package logfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxNote is more than a note takes.
const maxNote = 256

// maxZeros is more than what a hole leaves of a page that it ends in.
const maxZeros = 4 << 20

// Start tells where to read on from an offset: there, or, if what was there is not kept any more, where that begins which is. Call
// it after a read, to know that what was read had not been lost meanwhile.
func Start(f *os.File, offset int64) (int64, error) {
	data, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // an empty file
		return 0, nil
	}
	if err != nil && !errors.Is(err, unix.EINVAL) { // the latter where there are no holes
		return 0, fmt.Errorf("beginning of %s: %w", f.Name(), err)
	}
	begin, line, err := firstLine(f, data)
	if err != nil {
		return 0, fmt.Errorf("beginning of %s: %w", f.Name(), err)
	}
	if begin == 0 || offset >= begin+line {
		return offset, nil
	}
	return begin, nil
}

// firstLine finds the first byte that is not of a hole, and how long the line is that it begins, of which a note's length counts.
func firstLine(f *os.File, from int64) (begin, length int64, err error) {
	block := make([]byte, 4096)
	for at := from; at < from+maxZeros; at += int64(len(block)) {
		n, err := f.ReadAt(block, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		kept := bytes.TrimLeft(block[:n], "\x00")
		if len(kept) == 0 && n == len(block) {
			continue
		}
		begin = at + int64(n-len(kept))
		note := make([]byte, maxNote)
		n, err = f.ReadAt(note, begin)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		return begin, int64(bytes.IndexByte(note[:n], '\n')) + 1, nil
	}
	return from + maxZeros, 0, nil
}
