package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"
)

// maxTransferBytes bounds one read or write, because nothing else runs on its thread meanwhile.
const maxTransferBytes = 64 << 10

// Conn is a connection of TCP, or of a Unix socket, that reads and writes without telling Go's scheduler that a system call has begun. It may do so because its
// socket does not block: who has to wait waits in the poller, as with any net.Conn, and deadlines and Close act as they do there.
//
// A system call that the scheduler knows of wakes its monitor thread, if the process has rested; the monitor then looks on every
// 20 µs, and has the goroutine wait for a place to run again if the call took as long, which over loopback it does: sending is
// receiving there. For a hop that rests between any two packets that was more than half of its context switches and of its time
// in the kernel.
type Conn struct {
	Stream
	raw syscall.RawConn
}

// Stream is what a Conn is made of: a *net.TCPConn or a *net.UnixConn of a stream.
type Stream interface {
	net.Conn
	syscall.Conn
	CloseRead() error
	CloseWrite() error
}

// NewConn takes a connection over.
func NewConn(c Stream) (*Conn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &Conn{c, raw}, nil
}

// TakeOver takes a connection over if it is a stream's; any other remains what it is.
func TakeOver(c net.Conn) net.Conn {
	if s, ok := c.(Stream); ok {
		if conn, err := NewConn(s); err == nil {
			return conn
		}
	}
	return c
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	var failed syscall.Errno
	err = c.raw.Read(func(fd uintptr) bool {
		n, failed = transfer(sysRead, fd, b)
		return failed != syscall.EAGAIN
	})
	if err = c.fault("read", err, failed); err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (n int, err error) {
	var failed syscall.Errno
	err = c.raw.Write(func(fd uintptr) bool {
		for n < len(b) {
			var some int
			if some, failed = transfer(sysWrite, fd, b[n:]); failed != 0 {
				return failed != syscall.EAGAIN
			}
			n += some
		}
		return true
	})
	return n, c.fault("write", err, failed)
}

// quiet says whether the connection is open and has nothing to read, as one that nobody uses should be.
func (c *Conn) quiet() bool {
	var failed syscall.Errno
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, failed = syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b)), 1, syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
		return true
	})
	return err == nil && failed == syscall.EAGAIN
}

// fault is the error of an operation as package net has it: err is the poller's, failed the system call's.
func (c *Conn) fault(operation string, err error, failed syscall.Errno) error {
	if theirs, ok := errors.AsType[*net.OpError](err); ok {
		theirs.Op = operation // it was made for this call
		return theirs
	}
	if err == nil && failed != 0 {
		err = os.NewSyscallError(operation, failed)
	}
	if err == nil {
		return nil
	}
	return &net.OpError{Op: operation, Net: c.LocalAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// transfer makes a system call that reads into b or writes of it, on a socket that does not block.
func transfer(call func(fd uintptr, b []byte) (int, syscall.Errno), fd uintptr, b []byte) (int, syscall.Errno) {
	b = b[:min(len(b), maxTransferBytes)]
	for {
		if n, failed := call(fd, b); failed != syscall.EINTR {
			return n, failed
		}
	}
}

// listener takes the connections of another over.
type listener struct{ net.Listener }

// Listener makes a listener's connections Conns.
func Listener(l net.Listener) net.Listener { return listener{l} }

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return TakeOver(c), nil
}
