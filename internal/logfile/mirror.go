package logfile

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// How much a mirror passes on: whoever keeps it, as containerd does for the kubelet, looks for its size now and then only.
const (
	mirrorBytesPerSecond = 1 << 20
	mirrorBurstBytes     = 4 << 20
)

// pipeBytes is what a pipe takes whole or not at all; see pipe(7), PIPE_BUF.
const pipeBytes = 4096

// Mirror passes on to a pipe what goes to a file. It never waits: what the pipe has no room for, because nobody reads it or because
// it is too much, is dropped, and told when there is room.
type Mirror struct {
	process *os.File      // a pidfd
	watched chan struct{} // closed when nobody waits for its end any more

	mu   sync.Mutex // guards what follows
	fd   int        // -1 when it is let go of
	pace *rate.Limiter
	lost loss
	open *Stream // whose line was passed on last without its end
}

// OpenMirror opens the pipe that is the standard output of a process, by its inode number, so that it is not another's that has the
// process's number since. It lets go of the pipe when that process ends, for whoever reads it waits for its end to be the process's.
func OpenMirror(pid uint32, inode uint64) (*Mirror, error) {
	process, err := unix.PidfdOpen(int(pid), unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	m := &Mirror{process: os.NewFile(uintptr(process), "pidfd"), watched: make(chan struct{}), pace: rate.NewLimiter(mirrorBytesPerSecond, mirrorBurstBytes)}
	if m.fd, err = openPipe(pid, inode); err != nil {
		return nil, errors.Join(err, m.process.Close())
	}
	go m.watch()
	return m, nil
}

// openPipe opens the pipe.
func openPipe(pid uint32, inode uint64) (int, error) {
	path := "/proc/" + strconv.FormatUint(uint64(pid), 10) + "/fd/1"
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("output of process %d: %w", pid, err)
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFIFO || st.Ino != inode) {
		err = errors.New("it is not the pipe that was meant")
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("output of process %d: %w", pid, err), unix.Close(fd))
	}
	return fd, nil
}

// watch lets go of the pipe when the process ends, or its pidfd is closed.
func (m *Mirror) watch() {
	defer close(m.watched)
	if conn, err := m.process.SyscallConn(); err == nil {
		_ = conn.Read(func(fd uintptr) bool { // in the end it is let go of, whatever ends the wait
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 && err == nil
		})
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.letGo()
}

// letGo closes the pipe; mu must be held.
func (m *Mirror) letGo() {
	if m.fd >= 0 {
		_ = unix.Close(m.fd) // of what was written nothing is kept back
		m.fd = -1
	}
}

// Close lets go of the pipe.
func (m *Mirror) Close() error {
	if m == nil {
		return nil
	}
	err := m.process.Close()
	<-m.watched
	return err
}

// pass passes on what a stream has written.
func (m *Mirror) pass(from *Stream, text []byte) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.fd >= 0 && len(text) > 0 {
		n := min(len(text), pipeBytes-maxNote)
		if whole := bytes.LastIndexByte(text[:n], '\n') + 1; whole > 0 {
			n = whole
		}
		m.put(from, text[:n])
		text = text[n:]
	}
}

// put passes on one piece, or none of it; mu must be held.
func (m *Mirror) put(from *Stream, piece []byte) {
	var all []byte
	if m.open != nil && (m.open != from || m.lost.bytes > 0) {
		all = append(all, '\n')
	}
	if m.lost.bytes > 0 {
		all = append(all, m.lost.note("before this were dropped here: there was no room")...)
	}
	all = append(all, piece...)
	if !m.pace.AllowN(time.Now(), len(all)) {
		m.lost.add(piece)
		return
	}
	switch _, err := unix.Write(m.fd, all); {
	case err == nil:
		m.lost, m.open = loss{}, nil
		if piece[len(piece)-1] != '\n' {
			m.open = from
		}
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		m.lost.add(piece)
	default:
		m.letGo() // its reader has gone
	}
}
