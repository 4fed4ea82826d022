package link_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-serverless/hearth/bench/link"
)

// zeros is a stream of so many bytes.
func zeros(n int64) io.Reader { return io.LimitReader(endless{}, n) }

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestRates carries streams over each link, and looks how long that takes on a clock that only waiting moves.
func TestRates(t *testing.T) {
	const megabyte = 1_000_000
	for _, c := range []struct {
		name, link  string
		connections int
		bytes       int64
		least, most time.Duration
	}{
		{"no limit", "loopback", 4, 100 * megabyte, 0, 0},
		{"one connection may have it all", "gigabit", 1, 125 * megabyte, 990 * time.Millisecond, time.Second},
		{"four share it", "gigabit", 4, 125 * megabyte, 3990 * time.Millisecond, 4 * time.Second},
		{"one is held below", "capped", 1, 40 * megabyte, time.Second, 1020 * time.Millisecond},
		{"three are held below", "capped", 3, 40 * megabyte, time.Second, 1020 * time.Millisecond},
		{"eight fill it", "capped", 8, 25 * megabyte, 1590 * time.Millisecond, 1620 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := link.New(link.Named()[c.link])
				began := time.Now()
				var all sync.WaitGroup
				for range c.connections {
					all.Go(func() {
						var got counter
						if err := l.Copy(t.Context(), &got, zeros(c.bytes)); err != nil || int64(got) != c.bytes {
							t.Errorf("%d bytes came, error %v", got, err)
						}
					})
				}
				all.Wait()
				if took := time.Since(began); took < c.least || took > c.most {
					t.Errorf("took %v, want %v to %v", took, c.least, c.most)
				}
			})
		})
	}
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := link.New(link.Speed{RoundTrip: 20 * time.Millisecond})
		began := time.Now()
		var out bytes.Buffer
		if err := l.Copy(t.Context(), &out, bytes.NewReader([]byte("hello"))); err != nil || out.String() != "hello" {
			t.Fatalf("came %q, error %v", out.String(), err)
		}
		if took := time.Since(began); took != 10*time.Millisecond {
			t.Errorf("one way took %v, want half of a round trip", took)
		}
	})
}

func TestCopyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := link.New(link.Speed{BytesPerSecond: 1000}).Copy(ctx, io.Discard, zeros(1<<30))
		if err == nil {
			t.Error("it went on although its context ended")
		}
	})
}

// TestServe carries a conversation over real sockets, and ends with a connection open.
func TestServe(t *testing.T) {
	echo, front := listen(t), listen(t)
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- link.New(link.Named()["capped"]).Serve(ctx, front, echo.Addr().String())
	}()
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	said := bytes.Repeat([]byte("conversation"), 100_000)
	go func() { _, _ = c.Write(said) }()
	heard := make([]byte, len(said))
	if _, err := io.ReadFull(c, heard); err != nil || !bytes.Equal(said, heard) {
		t.Errorf("what came back is not what was said: %v", err)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := c.Read(heard); !errors.Is(err, io.EOF) {
		var op *net.OpError
		if !errors.As(err, &op) {
			t.Errorf("the connection is open after the end: %v", err)
		}
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}
