package stack

import (
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ports are addresses that were chosen before anyone listens on them, and are kept free for those who were told of them.
type ports struct {
	sockets []*os.File
}

// takePorts replaces port 0 by a free port, so that everyone can be told the address before it is listened on.
func (c Config) takePorts() (Config, *ports, error) {
	taken := &ports{}
	for _, address := range []*string{&c.GatewayAddress, &c.RegistryAddress} {
		if !strings.HasSuffix(*address, ":0") {
			continue
		}
		at, err := taken.take(*address)
		if err != nil {
			taken.release()
			return c, nil, fmt.Errorf("take a free port: %w", err)
		}
		*address = at
	}
	return c, taken, nil
}

// take binds a socket that never listens. The kernel then gives that port to nobody who asks for any, be it for a connection of his own;
// but who names it may listen, if both say SO_REUSEADDR, which Go's listeners do.
func (p *ports) take(address string) (string, error) {
	tcp, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return "", err
	}
	host := tcp.AddrPort().Addr().Unmap()
	family, at := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: host.As16()})
	if host.Is4() {
		family, at = unix.AF_INET, &unix.SockaddrInet4{Addr: host.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", os.NewSyscallError("socket", err)
	}
	p.sockets = append(p.sockets, os.NewFile(uintptr(fd), address))
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return "", os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, at); err != nil {
		return "", os.NewSyscallError("bind", err)
	}
	chosen, err := unix.Getsockname(fd)
	if err != nil {
		return "", os.NewSyscallError("getsockname", err)
	}
	switch a := chosen.(type) {
	case *unix.SockaddrInet4:
		tcp.Port = a.Port
	case *unix.SockaddrInet6:
		tcp.Port = a.Port
	}
	return tcp.String(), nil
}

func (p *ports) release() {
	for _, s := range p.sockets {
		_ = s.Close()
	}
}
