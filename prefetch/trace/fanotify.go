package trace

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

const (
	// maxFiles of a recording, by fanotify: some 4 MiB.
	maxFiles = 1 << 14
	// maxOverlays that are marked for a recording: an image in use by more containers is known well enough.
	maxOverlays = 256
)

// opens records by fanotify: who opens which file is told by the kernel, and which parts of them were needed is taken from what is
// in memory then. Every recording has a group of its own.
type opens struct{}

func openFanotify() (method, error) {
	fd, err := newGroup()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := mark(fd, "/"); err != nil {
		return nil, err
	}
	return opens{}, nil
}

func (opens) name() string { return Fanotify }
func (opens) close() error { return nil }

func newGroup() (int, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK,
		unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC|unix.O_NOATIME)
	if err != nil {
		return -1, os.NewSyscallError("fanotify_init", err)
	}
	return fd, nil
}

// mark asks for all opens on the file system of a path, whoever has it mounted.
func mark(fd int, path string) error {
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN, unix.AT_FDCWD, path); err != nil {
		return &os.PathError{Op: "fanotify_mark", Path: path, Err: err}
	}
	return nil
}

// opened is a file of a layer.
type opened struct {
	path          string // in this mount namespace
	device, inode uint64
}

// listener is a recording by fanotify; only its goroutine uses it until done is closed.
type listener struct {
	events, mounts, wake int // file descriptors
	groups               []group
	roots                []root
	identities           []identity // of the directories of roots
	collector            *collector
	noted                chan struct{} // closed when all that was opened before it was ready is in files
	stopping             chan struct{}
	done                 chan struct{}

	overlays []uint64              // devices of those that are marked
	known    map[identity]struct{} // what the cgroups opened, as it looked to them, of layers or not
	files    []*opened             // those of layers, in the order of first opening
	ready    bool                  // noted is closed, and what was in memory then is collected
	lost     uint64
	err      error
}

type identity struct{ device, inode uint64 }

func (opens) begin(groups []group, roots []root, c *collector) (_ recorder, err error) {
	l := &listener{
		events: -1, mounts: -1, wake: -1, groups: groups, roots: roots, collector: c,
		noted: make(chan struct{}), stopping: make(chan struct{}), done: make(chan struct{}), known: map[identity]struct{}{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.free())
		}
	}()
	if l.events, err = newGroup(); err != nil {
		return nil, err
	}
	if l.mounts, err = unix.Open(host.MountInfo, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, &os.PathError{Op: "open", Path: host.MountInfo, Err: err}
	}
	if l.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	var marked []uint64
	for _, r := range roots {
		var st unix.Stat_t
		if err := unix.Stat(r.path, &st); err != nil {
			return nil, &os.PathError{Op: "stat", Path: r.path, Err: err}
		}
		l.identities = append(l.identities, identity{st.Dev, st.Ino})
		if slices.Contains(marked, st.Dev) {
			continue
		}
		marked = append(marked, st.Dev)
		if err := mark(l.events, r.path); err != nil {
			return nil, err
		}
	}
	if err := l.markOverlays(); err != nil {
		return nil, err
	}
	go l.listen()
	return l, nil
}

// free closes what is open.
func (l *listener) free() error {
	var errs []error
	for _, fd := range []int{l.events, l.mounts, l.wake} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

// becameReady waits until what was opened before is noted, so that it is told apart from what is opened after.
func (l *listener) becameReady() {
	l.signal()
	select {
	case <-l.noted:
	case <-l.done:
	}
}

// signal has the goroutine look again.
func (l *listener) signal() {
	_, _ = unix.Write(l.wake, binary.NativeEndian.AppendUint64(nil, 1)) // fails only if it was told 2^64 times already
}

func (l *listener) end() (uint64, error) {
	close(l.stopping)
	l.signal()
	<-l.done
	return l.lost, errors.Join(l.err, l.free())
}

// listen runs until the end, and collects what is in memory then.
func (l *listener) listen() {
	defer close(l.done)
	polled := []unix.PollFd{
		{Fd: int32(l.wake), Events: unix.POLLIN}, {Fd: int32(l.events), Events: unix.POLLIN}, {Fd: int32(l.mounts), Events: unix.POLLPRI},
	}
	for {
		if _, err := unix.Poll(polled, -1); err != nil && !errors.Is(err, unix.EINTR) {
			l.err = os.NewSyscallError("poll", err)
			return
		}
		_, _ = unix.Read(l.wake, make([]byte, 8))
		if polled[2].Revents != 0 {
			if err := l.markOverlays(); err != nil {
				l.lost++
			}
		}
		at := l.collector.readySince()
		l.drain()
		if at != 0 && !l.ready {
			l.ready = true
			close(l.noted)
			l.collect(at - 1)
		}
		select {
		case <-l.stopping:
			l.drain()
			l.collect(monotonic())
			return
		default:
		}
	}
}

// markOverlays marks the overlays that have one of the roots below them: what is opened through them is no event of the layer's own
// file system.
func (l *listener) markOverlays() error {
	mounts, err := host.Mounts(host.MountInfo)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if m.Kind != "overlay" || slices.Contains(l.overlays, m.Device) || len(l.overlays) >= maxOverlays || !l.lies(m.Options) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(m.Point, &st); err != nil || st.Dev != m.Device {
			continue // gone, or covered by another
		}
		if err := mark(l.events, m.Point); err != nil {
			errs = append(errs, err)
			continue
		}
		l.overlays = append(l.overlays, m.Device)
	}
	return errors.Join(errs...)
}

// lies says whether one of the roots is a lower directory. containerd names them relative to where they all are when they are many.
func (l *listener) lies(options string) bool {
	for _, option := range strings.Split(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		if key != "lowerdir" && key != "lowerdir+" {
			continue
		}
		for _, dir := range strings.Split(value, ":") {
			var st unix.Stat_t
			if filepath.IsAbs(dir) && unix.Stat(dir, &st) == nil && slices.Contains(l.identities, identity{st.Dev, st.Ino}) {
				return true
			}
			if dir != "" && !filepath.IsAbs(dir) && slices.ContainsFunc(l.roots, func(r root) bool { return strings.HasSuffix(r.path, "/"+dir) }) {
				return true
			}
		}
	}
	return false
}

// drain reads all events that there are.
func (l *listener) drain() {
	buffer := make([]byte, 8<<10)
	for {
		n, err := unix.Read(l.events, buffer)
		switch {
		case err == nil:
			events, ok := parseOpens(buffer[:n])
			if !ok {
				l.lost++
			}
			for _, e := range events {
				l.note(e)
			}
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return
		default: // the file of one event could not be opened for us; that event is gone
			l.lost++
		}
	}
}

// openEvent is that somebody opened a file: fd is a file of this process's own, or negative if events were lost.
type openEvent struct{ fd, pid int32 }

// parseOpens reads fanotify_event_metadata, see fanotify(7). It is false if there is anything else.
func parseOpens(b []byte) (events []openEvent, ok bool) {
	const size, version = 24, 3
	for len(b) > 0 {
		if len(b) < size {
			return events, false
		}
		n := binary.NativeEndian.Uint32(b)
		if n < size || uint64(n) > uint64(len(b)) || b[4] != version {
			return events, false
		}
		events = append(events, openEvent{int32(binary.NativeEndian.Uint32(b[16:])), int32(binary.NativeEndian.Uint32(b[20:]))})
		b = b[n:]
	}
	return events, true
}

// note has a file, if it is of a layer, and was opened by a process of one of the cgroups.
func (l *listener) note(e openEvent) {
	if e.fd < 0 {
		l.lost++ // the queue was full
		return
	}
	defer unix.Close(int(e.fd))
	if int(e.pid) == os.Getpid() {
		return
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(e.fd), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return
	}
	as := identity{st.Dev, st.Ino}
	if _, known := l.known[as]; known {
		return
	}
	within, err := l.within(e.pid)
	if err == nil && !within {
		return
	}
	file := l.resolve(int(e.fd), as)
	switch {
	case err != nil && file == nil: // the process has ended meanwhile; whosever it was, this was no file of a layer
	case err != nil, len(l.known) >= maxFiles:
		l.lost++
	default:
		l.known[as] = struct{}{}
		if file != nil {
			l.files = append(l.files, file)
		}
	}
}

// within says whether a process is in one of the cgroups, or below.
func (l *listener) within(pid int32) (bool, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(int(pid)) + "/cgroup")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3) // number, controllers, path; of version 2 no controllers
		if len(fields) < 3 {
			continue
		}
		for _, g := range l.groups {
			same := fields[1] == "" && len(g.controllers) == 0 || slices.Contains(g.controllers, strings.Split(fields[1], ",")[0])
			if below, ok := strings.CutPrefix(fields[2], strings.TrimSuffix(g.path, "/")); same && ok && (below == "" || below[0] == '/') {
				return true, nil
			}
		}
	}
	return false, nil
}

// resolve finds the file of a layer that a file descriptor is, or nil. An overlay shows a file of a lower directory by the same inode
// number, on a device of its own; its path is that in the mount namespace of who opened it, so it may have more in front.
func (l *listener) resolve(fd int, as identity) *opened {
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil || !filepath.IsAbs(path) {
		return nil
	}
	for rest := path; rest != ""; {
		for _, r := range l.roots {
			for _, at := range []string{r.path + rest, rest} {
				var st unix.Stat_t
				if unix.Lstat(at, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Ino == as.inode && st.Dev == r.device {
					return &opened{path: at, device: st.Dev, inode: st.Ino}
				}
			}
		}
		next := strings.IndexByte(rest[1:], '/')
		if next < 0 {
			break
		}
		rest = rest[1+next:]
	}
	return nil
}

// collect has what is in memory of all files as needed.
func (l *listener) collect(at int64) {
	for _, file := range l.files {
		if err := file.resident(func(first, pages uint64) { l.collector.add(file.device, file.inode, first, pages, at) }); err != nil {
			l.lost++
		}
	}
}
