package prefetch

import (
	"encoding/binary"
	"os"
	"path"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of the search for a trace's files in a layer.
const (
	maxEntries = 4_000_000
	maxPending = 1 << 16 // directories that were seen and not looked into
)

// openHow opens what a profile or a directory names: below the root, and nothing that a hostile layer could lead elsewhere by. It
// does not wait for a fifo, and no access is noted.
func openHow(flags uint64) *unix.OpenHow {
	return &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOATIME | unix.O_NOCTTY | flags,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
}

// aside runs f on a thread of its own, whose reads come after others', and its processing too if nice is more than 0.
//
// The I/O class stays "best effort", at its end: a page that is being read belongs to whoever waits for it too, and "idle" could
// have that one wait for as long as anybody else reads.
func aside(nice int, f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // without UnlockOSThread: the thread ends with the goroutine
		lowerPriority(nice)
		f()
	}()
	<-done
}

// lowerPriority is for this thread. What the kernel refuses is left.
func lowerPriority(nice int) {
	const whoProcess, bestEffort, lowest = 1, 2 << 13, 7
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, 0, bestEffort|lowest)
	if nice > 0 {
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), nice)
	}
}

// resolve finds the files with these ids in an image's layers, by reading their directories and nothing else. known are some that
// need not be looked for; what is found until the deadline is added. Layers on file systems of which nothing is wanted are not looked into.
func resolve(layers []Layer, wanted map[fileID]bool, known map[fileID]fileKey, deadline time.Time) {
	for id := range known {
		delete(wanted, id)
	}
	budget := maxEntries
	for _, l := range layers {
		var st unix.Stat_t
		if unix.Stat(l.Dir, &st) != nil { // the image was removed meanwhile
			continue
		}
		missing := false
		for id := range wanted {
			missing = missing || id.device == uint64(st.Dev)
		}
		if missing {
			walk(l, &budget, func(name string, inode uint64) bool {
				if id := (fileID{uint64(st.Dev), inode}); wanted[id] && goodPath(name) {
					known[id] = fileKey{l.DiffID, name}
					delete(wanted, id)
				}
				return len(wanted) > 0 && time.Now().Before(deadline)
			})
		}
	}
}

// walk calls visit for each regular file of a layer, until that returns false.
func walk(l Layer, budget *int, visit func(name string, inode uint64) bool) {
	root, err := os.Open(l.Dir)
	if err != nil {
		return
	}
	defer root.Close()
	buf := make([]byte, 64<<10)
	pending := []string{"."}
	for len(pending) > 0 {
		dir := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		fd, err := unix.Openat2(int(root.Fd()), dir, openHow(unix.O_DIRECTORY))
		if err != nil {
			continue
		}
		more := true
		for more {
			n, err := unix.Getdents(fd, buf)
			if err != nil || n <= 0 {
				break
			}
			more = entries(buf[:n], func(name string, inode uint64, kind byte) bool {
				name = path.Join(dir, name)
				if *budget--; *budget < 0 {
					return false
				}
				if kind == unix.DT_UNKNOWN {
					kind = kindOf(int(root.Fd()), name)
				}
				switch {
				case kind == unix.DT_REG:
					return visit(name, inode)
				case kind == unix.DT_DIR && len(pending) < maxPending && len(name) <= maxPath:
					pending = append(pending, name)
				}
				return true
			})
		}
		_ = unix.Close(fd)
		if !more {
			return
		}
	}
}

// kindOf asks for what a file is where its directory does not say.
func kindOf(root int, name string) byte {
	var st unix.Stat_t
	if unix.Fstatat(root, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return unix.DT_UNKNOWN
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return unix.DT_REG
	case unix.S_IFDIR:
		return unix.DT_DIR
	}
	return unix.DT_UNKNOWN
}

// entries calls visit for each entry of what getdents64(2) has returned, until that returns false.
func entries(buf []byte, visit func(name string, inode uint64, kind byte) bool) bool {
	const inodeAt, lengthAt, kindAt, nameAt = 0, 16, 18, 19
	for len(buf) >= nameAt {
		length := int(binary.NativeEndian.Uint16(buf[lengthAt:]))
		if length < nameAt || length > len(buf) {
			return true
		}
		name := buf[nameAt:length]
		for i, c := range name {
			if c == 0 {
				name = name[:i]
				break
			}
		}
		if s := string(name); s != "." && s != ".." && s != "" {
			if !visit(s, binary.NativeEndian.Uint64(buf[inodeAt:]), buf[kindAt]) {
				return false
			}
		}
		buf = buf[length:]
	}
	return true
}
