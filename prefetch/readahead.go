package prefetch

import (
	"context"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// readAhead has the kernel read a profile's ranges from below root, at most budget bytes of them, and returns how many it asked
// for. What is in memory already costs nothing. A file that is not there any more is passed over.
func readAhead(ctx context.Context, root *os.File, p *Profile, budget int64) (asked int64, err error) {
	for _, f := range p.Files {
		if ctx.Err() != nil {
			return asked, ctx.Err()
		}
		fd, err := unix.Openat2(int(root.Fd()), strings.TrimPrefix(f.Path, "/"), &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOATIME, // never wait for a fifo
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		})
		if err != nil {
			continue
		}
		n, err := readRanges(fd, f, budget-asked)
		asked += n
		_ = unix.Close(fd)
		if err != nil {
			return asked, fmt.Errorf("read ahead %s: %w", f.Path, err)
		}
		if asked >= budget {
			break
		}
	}
	return asked, nil
}

// adviseBytes is what the kernel reads for one advice at most where a device has the common read-ahead of 128 KiB; it cuts off the
// rest without a word.
const adviseBytes = 128 << 10

func readRanges(fd int, f File, budget int64) (asked int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, err
	}
	for _, r := range f.Ranges {
		n := min(r.Length, st.Size-r.Offset, budget-asked)
		if n <= 0 {
			continue
		}
		for at, end := r.Offset, r.Offset+n; at < end; at += adviseBytes {
			if err := unix.Fadvise(fd, at, min(adviseBytes, end-at), unix.FADV_WILLNEED); err != nil {
				return asked, err
			}
		}
		asked += n
	}
	return asked, nil
}
