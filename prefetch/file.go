package prefetch

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// layerFile is a regular file of a layer.
type layerFile struct {
	fd   int
	id   fileID
	size int64
}

// openFile opens one below a layer's root, and nothing else: no link is followed, and what is not a regular file is none.
func openFile(root *os.File, path string) (layerFile, bool) {
	fd, err := unix.Openat2(int(root.Fd()), path, openHow(0))
	if err != nil {
		return layerFile{}, false
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		return layerFile{}, false
	}
	return layerFile{fd: fd, id: fileID{uint64(st.Dev), st.Ino}, size: st.Size}, true
}

func (f layerFile) close() { _ = unix.Close(f.fd) } // it was only read

// clip is the part of a span that the file has.
func (f layerFile) clip(s span) (span, bool) {
	if s.offset >= f.size {
		return span{}, false
	}
	s.length = min(s.length, f.size-s.offset)
	return s, true
}

// noCachestat is set when the kernel has turned out not to have cachestat(2), which came with Linux 6.5.
var noCachestat atomic.Bool

// missing is how many bytes of a span are not in memory.
func (f layerFile) missing(s span) int64 {
	page := int64(os.Getpagesize())
	if !noCachestat.Load() {
		var stat unix.Cachestat_t
		err := unix.Cachestat(uint(f.fd), &unix.CachestatRange{Off: uint64(s.offset), Len: uint64(s.length)}, &stat, 0)
		if err == nil {
			return max(s.length-int64(stat.Cache)*page, 0)
		}
		noCachestat.Store(err == unix.ENOSYS || err == unix.EPERM)
	}
	return s.length - f.residentBytes(s, page)
}

// residentBytes asks mincore(2), for at most 1 GiB: of what is beyond, nothing is known.
func (f layerFile) residentBytes(s span, page int64) int64 {
	start := s.offset / page * page
	area, err := unix.Mmap(f.fd, start, int(min(s.end()-start, 1<<30)), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Munmap(area) }()
	present := make([]byte, (int64(len(area))+page-1)/page)
	if err := mincore(area, present); err != nil {
		return 0
	}
	n := int64(0)
	for _, p := range present {
		n += int64(p&1) * page
	}
	return min(n, s.length)
}

// readAhead has the kernel read a span, in parts that it reads whole: of longer ones it cuts off the rest without a word. Parts that
// are in memory are passed over. part is adviseBytes of the file's device.
func (f layerFile) readAhead(ctx context.Context, s span, part int64) {
	if part == 0 {
		f.readThrough(ctx, s)
		return
	}
	whole := s.length <= part
	for at, end := s.offset, s.end(); at < end && ctx.Err() == nil; at += part {
		n := min(part, end-at)
		if !whole && f.missing(span{at, n}) == 0 {
			continue
		}
		if unix.Fadvise(f.fd, at, n, unix.FADV_WILLNEED) != nil {
			return
		}
	}
}

// readThrough reads a span itself, where read-ahead is turned off.
func (f layerFile) readThrough(ctx context.Context, s span) {
	buf := make([]byte, 64<<10)
	for at := s.offset; at < s.end() && ctx.Err() == nil; {
		n, err := unix.Pread(f.fd, buf[:min(int64(len(buf)), s.end()-at)], at)
		if err != nil || n <= 0 {
			return
		}
		at += int64(n)
	}
}

// commonAdvice is what the kernel reads for one advice at least, unless a device says otherwise.
const commonAdvice = 128 << 10

// adviseBytes is how much the kernel reads for one advice on a device: its read-ahead, or the common one if it does not say. It is 0
// where read-ahead is turned off.
func adviseBytes(device uint64) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(device), unix.Minor(device)))
	if err != nil {
		return commonAdvice
	}
	kb, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil || kb < 0 {
		return commonAdvice
	}
	return min(kb<<10, 4<<20)
}
