package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

// A client that breaks off in its body has sent nothing to the server, whose connection stays as it was.
func TestBrokenBody(t *testing.T) {
	s, transport := start(t, func(_ int, p *peer) {
		for r, _ := p.request(); r != nil; r, _ = p.request() {
			if r.Method != "GET" {
				t.Errorf("%s has come", r.Method)
			}
			p.say(ok)
		}
	})
	broken := errors.New("broken")
	for range 2 {
		r := request(t, "POST", "")
		r.Body, r.ContentLength = io.NopCloser(io.MultiReader(strings.NewReader("bo"), failing{broken})), 4
		if res, _, err := ask(transport, r); err == nil {
			t.Errorf("%v", res)
		}
		if _, body, err := ask(transport, request(t, "GET", "")); body != "hello" || err != nil {
			t.Errorf("%q %v", body, err)
		}
	}
	if s.connections() != 1 {
		t.Errorf("%d connections", s.connections())
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// A connection that waited long for the body of its request is not used for it. If there is no other then, that is no failure to
// connect: the body has been read, and the request cannot go elsewhere.
func TestSlowBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{t: t, pipes: true, script: func(_ int, p *peer) {
			for r, sent := p.request(); r != nil; r, sent = p.request() {
				p.say(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(sent), sent))
			}
		}}
		refused := errors.New("refused")
		var dial func(context.Context) (net.Conn, error)
		transport := relay.NewTransport(relay.TransportConfig{MaxIdle: 2, Dial: func(ctx context.Context) (net.Conn, error) { return dial(ctx) }})
		send := func() (string, error) {
			body, in := io.Pipe()
			var client sync.WaitGroup
			client.Go(func() {
				time.Sleep(2 * time.Second)
				_, _ = io.WriteString(in, "body")
				_ = in.Close()
			})
			defer client.Wait()
			r := request(t, "POST", "")
			r.Body, r.ContentLength = body, 4
			_, got, err := ask(transport, r)
			return got, err
		}
		for n := 1; n <= 3; n += 2 {
			dial = s.dial
			if body, err := send(); body != "body" || err != nil || s.connections() != n+1 {
				t.Errorf("%q, %v, %d connections", body, err, s.connections())
			}
			dial = func(context.Context) (net.Conn, error) { return nil, refused }
			_, err := send()
			if failed, _ := errors.AsType[*relay.Failure](err); failed == nil || !failed.Reused || failed.Written || errors.Is(err, refused) {
				t.Errorf("%#v", err)
			}
			if _, err := send(); !errors.Is(err, refused) {
				t.Errorf("not read: %v", err)
			}
		}
		transport.CloseIdleConnections()
		s.scripts.Wait()
	})
}
