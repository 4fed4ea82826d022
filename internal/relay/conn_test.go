package relay_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

// patience is for what another goroutine or the kernel brings about; a test that needs all of it has failed.
const patience = 30 * time.Second

// pair is both ends of a connection; ours is a relay.Conn.
func pair(t testing.TB) (ours *relay.Conn, theirs *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dialed, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ours, err = relay.NewConn(dialed.(*net.TCPConn))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = ours.Close()
		_ = accepted.Close()
	})
	return ours, accepted.(*net.TCPConn)
}

// More than the kernel holds goes both ways at once, and comes as it was sent.
func TestConnTransfers(t *testing.T) {
	ours, theirs := pair(t)
	data := make([]byte, 16<<20+7)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	var all sync.WaitGroup
	for _, c := range []interface {
		net.Conn
		CloseWrite() error
	}{ours, theirs} {
		all.Go(func() {
			if n, err := c.Write(data); n != len(data) || err != nil {
				t.Errorf("%T wrote %d bytes, %v", c, n, err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		all.Go(func() {
			got, err := io.ReadAll(struct{ io.Reader }{c})
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%T read %d bytes, %v", c, len(got), err)
			}
		})
	}
	all.Wait()
	if n, err := ours.Read(nil); n != 0 || err != nil {
		t.Errorf("nothing was asked for: %d, %v", n, err)
	}
}

// Errors are those of package net, and a deadline ends nothing but what waits.
func TestConnDeadlines(t *testing.T) {
	ours, theirs := pair(t)
	full := make([]byte, 1<<20)
	for name, operation := range map[string]func() error{
		"read": func() error { _, err := ours.Read(full); return err },
		"write": func() error {
			for {
				if _, err := ours.Write(full); err != nil {
					return err
				}
			}
		},
	} {
		for _, early := range []bool{true, false} {
			ended := make(chan error, 1)
			if early {
				_ = ours.SetDeadline(time.Unix(1, 0))
			}
			go func() { ended <- operation() }()
			if !early { // before or while it waits: the outcome is the same
				_ = ours.SetDeadline(time.Unix(1, 0))
			}
			err := <-ended
			var op *net.OpError
			if !errors.As(err, &op) || op.Op != name || !op.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %v", name, err)
			}
			_ = ours.SetDeadline(time.Time{})
		}
	}
	if _, err := theirs.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := ours.Read(full); n != 1 || err != nil {
		t.Errorf("after its deadlines: %d bytes, %v", n, err)
	}
}

func TestConnEnds(t *testing.T) {
	buf := make([]byte, 1)
	ours, theirs := pair(t)
	_ = theirs.Close()
	if n, err := ours.Read(buf); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("closed by the other: %d, %v", n, err)
	}

	ours, theirs = pair(t)
	_ = theirs.SetLinger(0)
	_ = theirs.Close()
	var op *net.OpError
	if _, err := ours.Read(buf); !errors.As(err, &op) || op.Op != "read" || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("reset by the other: %v", err)
	}
	if _, err := ours.Write(buf); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("written after that: %v", err)
	}

	ours, _ = pair(t)
	ended := make(chan error, 1)
	go func() {
		_, err := ours.Read(buf)
		ended <- err
	}()
	_ = ours.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed while it waits, or before: %v", err)
	}
	if _, err := ours.Write(buf); !errors.Is(err, net.ErrClosed) {
		t.Errorf("written after that: %v", err)
	}
}
