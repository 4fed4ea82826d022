package disk

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// requestBytes is the most that the kernel asks for at once.
	requestBytes = 1 << 20
	// requestsAtOnce is more than a loop device has under way: the disk's speed is to be the limit.
	requestsAtOnce = 256
	// urgency is the server's niceness: no disk waits for the cores of who reads from it.
	urgency = -15
	// serving is the line that says so.
	serving = "serving\n"
)

// Serve serves the disk in a folder that New has made, until in ends, as it does when the process at its other end does. in begins
// with the disk's Speed.
func Serve(home string, in io.Reader, out io.Writer) error {
	said := json.NewDecoder(in)
	var speed Speed
	if err := said.Decode(&speed); err != nil {
		return fmt.Errorf("serve a disk: read its speed: %w", err)
	}
	if speed.BytesPerSecond <= 0 || speed.Latency < 0 {
		return fmt.Errorf("serve a disk: no disk is as fast as %+v", speed)
	}
	backing, err := os.OpenFile(filepath.Join(home, memoryName, imageName), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("serve a disk: %w", err)
	}
	defer backing.Close()
	// Refused, the disk is no slower unless the machine is busy, which the suite's own measurement would show.
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, urgency)
	server, err := serve(filepath.Join(home, servedName), backing, &pacer{speed: speed})
	if err != nil {
		return fmt.Errorf("serve a disk: %w", err)
	}
	if _, err := io.WriteString(out, serving); err != nil {
		return errors.Join(err, unmount(filepath.Join(home, servedName)))
	}
	_, _ = io.Copy(io.Discard, said.Buffered())
	_, _ = io.Copy(io.Discard, in) // its end is the end, however it comes
	// With the disk still mounted the kernel holds on to the file. When this process is gone, all it asks for is refused.
	if err := unix.Unmount(filepath.Join(home, servedName), unix.MNT_DETACH); err != nil {
		return fmt.Errorf("end of a served disk: %w", err)
	}
	_ = server // it ends with the process
	return nil
}

// serve mounts a file system that has one file, whose reads are paced.
func serve(dir string, backing *os.File, p *pacer) (*fuse.Server, error) {
	second := time.Second
	return fs.Mount(dir, &root{file: &image{backing: backing, pacer: p}}, &fs.Options{
		AttrTimeout: &second, EntryTimeout: &second,
		MountOptions: fuse.MountOptions{
			FsName: "hearth-disk", Name: "hearth-disk", DirectMountStrict: true, DirectMount: true, DisableXAttrs: true,
			MaxBackground: requestsAtOnce, MaxWrite: requestBytes, ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		},
	})
}

// root is the folder of the one file.
type root struct {
	fs.Inode
	file *image
}

// OnAdd puts the file there.
func (r *root) OnAdd(ctx context.Context) {
	r.AddChild(imageName, r.NewPersistentInode(ctx, r.file, fs.StableAttr{Mode: fuse.S_IFREG}), false)
}

// image is the file that a disk is.
type image struct {
	fs.Inode
	backing *os.File
	pacer   *pacer
}

var (
	_ fs.NodeOnAdder   = (*root)(nil)
	_ fs.NodeGetattrer = (*image)(nil)
	_ fs.NodeOpener    = (*image)(nil)
	_ fs.NodeReader    = (*image)(nil)
	_ fs.NodeWriter    = (*image)(nil)
	_ fs.NodeFsyncer   = (*image)(nil)
)

// Getattr says the file's size.
func (f *image) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.backing.Fd()), &st); err != nil {
		return fs.ToErrno(err)
	}
	out.FromStat(&st)
	return fs.OK
}

// Open has the kernel keep nothing of what it reads.
func (f *image) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, fs.OK
}

// Read answers when the disk would.
func (f *image) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	due := f.pacer.due(clock(), len(dest))
	n, err := f.backing.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fs.ToErrno(err)
	}
	sleepUntil(due)
	return fuse.ReadResultData(dest[:n]), fs.OK
}

// Write takes no longer than memory does.
func (f *image) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	n, err := f.backing.WriteAt(data, off)
	return uint32(n), fs.ToErrno(err)
}

// Fsync has nothing to do: memory is all there is.
func (f *image) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return fs.OK }

// clock is what sleepUntil goes by.
func clock() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // this clock is always there
	return time.Duration(now.Nano())
}

// sleepUntil sleeps in the kernel: timers of Go's own are up to a millisecond late in a process that does nothing else.
func sleepUntil(due time.Duration) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // refused, sleeps are 50 microseconds longer
	until := unix.NsecToTimespec(int64(due))
	for errors.Is(unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &until, nil), unix.EINTR) {
	}
}

// server is the process that serves a disk.
type server struct {
	cmd *exec.Cmd
	in  io.WriteCloser
}

// startServer starts it, and returns when the disk is served.
func startServer(ctx context.Context, home string, speed Speed, command []string) (_ *server, err error) {
	if len(command) == 0 {
		return nil, errors.New("serve a disk: no command was given that does")
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s := &server{cmd: exec.Command(command[0], append(command[1:], home)...)}
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is for who uses the disk
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("serve a disk: %w", err)
	}
	ready := make(chan error, 1)
	go func() {
		err := json.NewEncoder(s.in).Encode(speed)
		if err == nil {
			_, err = bufio.NewReader(out).ReadString(serving[len(serving)-1])
		}
		ready <- err
	}()
	select {
	case err = <-ready:
	case <-ctx.Done():
		_ = s.cmd.Process.Kill() // which ends the read
		err = errors.Join(ctx.Err(), <-ready)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("await the server of a disk: %w", err), s.stop())
	}
	return s, nil
}

// stop ends the server, with force if need be.
func (s *server) stop() error {
	_ = s.in.Close()
	force := time.AfterFunc(patience, func() { _ = s.cmd.Process.Kill() })
	defer force.Stop()
	if err := s.cmd.Wait(); err != nil {
		return fmt.Errorf("end the server of a disk: %w", err)
	}
	return nil
}
