package sidecar

import (
	"errors"
	"net"
	"sync"

	"github.com/hearth-serverless/hearth/internal/relay"
)

// limited is a listener that lets so many connections be at once. More of them wait in the kernel, which bounds them too.
type limited struct {
	*net.TCPListener
	free   chan struct{}
	closed chan struct{}
	once   sync.Once
}

func limit(l *net.TCPListener, connections int) *limited {
	return &limited{TCPListener: l, free: make(chan struct{}, connections), closed: make(chan struct{})}
}

// Accept implements net.Listener.
func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.free <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.AcceptTCP()
	if err != nil {
		<-l.free
		return nil, err
	}
	quick, err := relay.NewConn(conn)
	if err != nil {
		<-l.free
		return nil, errors.Join(err, conn.Close())
	}
	return &counted{Conn: quick, leave: sync.OnceFunc(func() { <-l.free })}, nil
}

// Close implements net.Listener.
func (l *limited) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.TCPListener.Close()
}

// counted gives its place back when it is closed.
type counted struct {
	*relay.Conn
	leave func()
}

// Close implements net.Conn.
func (c *counted) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
