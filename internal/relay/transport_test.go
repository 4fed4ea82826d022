package relay_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

// Every way in which an answer can end is understood, and a connection is used again if, and only if, nothing is wrong with it.
func TestAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		method, answer string
		status         int
		body           string
		reused         bool
	}{
		"length":     {"GET", ok, 200, "hello", true},
		"empty":      {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, "", true},
		"none":       {"GET", "HTTP/1.1 204 No Content\r\n\r\n", 204, "", true},
		"unchanged":  {"GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", 304, "", true},
		"head":       {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", 200, "", true},
		"chunks":     {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Sum\r\n\r\n5\r\nhello\r\n0\r\nSum: 1\r\n\r\n", 200, "hello", true},
		"early":      {"GET", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + ok, 200, "hello", true},
		"to the end": {"GET", "HTTP/1.1 200 OK\r\n\r\nhello", 200, "hello", false},
		"close":      {"GET", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", 200, "hello", false},
		"1.0":        {"GET", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, "hello", false},
		"too much":   {"GET", ok + "more", 200, "hello", false},
		"put":        {"PUT", ok, 200, "hello", true},
	} {
		t.Run(name, func(t *testing.T) {
			s, transport := start(t, func(n int, p *peer) {
				for {
					r, sent := p.request()
					if r == nil {
						return
					}
					if want := map[bool]string{true: "body"}[r.Method == "PUT"]; r.RequestURI != "/path?q" || r.Host != "server" || sent != want {
						t.Errorf("%s %s of %s with %q", r.Method, r.RequestURI, r.Host, sent)
					}
					p.say(c.answer)
					if name == "to the end" {
						return
					}
				}
			})
			for range 2 {
				early := 0
				trace := &httptrace.ClientTrace{
					Got1xxResponse: func(int, textproto.MIMEHeader) error { early++; return nil },
				}
				r := request(t, c.method, map[bool]string{true: "body"}[c.method == "PUT"])
				res, body, err := ask(transport, r.WithContext(httptrace.WithClientTrace(r.Context(), trace)))
				if err != nil || res.StatusCode != c.status || body != c.body {
					t.Fatalf("%v %q %v", res, body, err)
				}
				if want := map[string]int{"early": 2}[name]; early != want {
					t.Errorf("%d answers of 1xx", early)
				}
				if want := map[string]string{"chunks": "1"}[name]; res.Trailer.Get("Sum") != want {
					t.Errorf("trailer %v", res.Trailer)
				}
			}
			if want := map[bool]int{true: 1, false: 2}[c.reused]; s.connections() != want {
				t.Errorf("%d connections", s.connections())
			}
		})
	}
}

// What a hostile server says ends in an error, in bounded memory, and with its connection.
func TestHostileAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"garbage":         "\x16\x03\x01\x02\x00garbage\r\n\r\n",
		"none":            "",
		"cut":             "HTTP/1.1 200 OK\r\nContent-",
		"status 099":      "HTTP/1.1 099 Low\r\n\r\n" + ok,
		"unasked upgrade": "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
		"two lengths":     "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
		"bad length":      "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
		"bad coding":      "HTTP/1.1 200 OK\r\nTransfer-Encoding: x\r\n\r\nhello",
		"short body":      "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello",
		"bad chunk":       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello",
		"cut chunk":       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello",
		"large header":    "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2<<20) + "\r\n\r\n",
		"many headers":    "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: x\r\n", 1<<18) + "\r\n",
		"endless 1xx":     strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 1<<16),
	} {
		t.Run(name, func(t *testing.T) {
			_, transport := start(t, func(_ int, p *peer) {
				_, _ = p.request()
				p.say(answer)
				if !strings.Contains(answer, "hello") && answer != "" && name != "cut" {
					p.ended() // by the client
				}
			})
			if res, body, err := ask(transport, request(t, "GET", "")); err == nil {
				t.Errorf("%v %.20q", res, body)
			}
		})
	}
}

// A server may close an idle connection at any time. Nobody notices, whatever the request, unless it closes just as one arrives; then
// those are sent again that may run twice.
func TestIdleConnectionsDie(t *testing.T) {
	s, transport := start(t, func(_ int, p *peer) {
		if r, _ := p.request(); r != nil {
			p.say(ok)
		}
	})
	for n := 1; n <= 3; n++ {
		if _, body, err := ask(transport, request(t, "POST", "body")); body != "hello" || err != nil {
			t.Fatalf("%q %v", body, err)
		}
		s.awaitClosed(n)
	}
	for name, c := range map[string]struct {
		method, body, key string
		again             bool
	}{
		"GET": {"GET", "", "", true}, "POST": {"POST", "body", "", false}, "DELETE": {"DELETE", "", "", false},
		"PUT": {"PUT", "body", "k", false}, "POST with a key": {"POST", "", "k", true},
	} {
		t.Run(name, func(t *testing.T) {
			s, transport := start(t, func(n int, p *peer) {
				if r, _ := p.request(); r == nil {
					return
				}
				p.say(ok)
				if r, _ := p.request(); r != nil && n > 1 {
					t.Error("a second request on the second connection")
				}
			})
			if _, _, err := ask(transport, request(t, "GET", "")); err != nil {
				t.Fatal(err)
			}
			r := request(t, c.method, c.body)
			if c.key != "" {
				r.Header.Set("Idempotency-Key", c.key)
			}
			_, body, err := ask(transport, r)
			if (err == nil) != c.again || c.again && body != "hello" {
				t.Errorf("%q %v", body, err)
			}
			if failed, _ := errors.AsType[*relay.Failure](err); !c.again && (failed == nil || !failed.Reused || !failed.Written) {
				t.Errorf("its failure is %#v", failed)
			}
			if want := map[bool]int{true: 2, false: 1}[c.again]; s.connections() != want {
				t.Errorf("%d connections", s.connections())
			}
		})
	}
	// On a new connection a failure is one.
	s, transport = start(t, func(_ int, p *peer) { _, _ = p.request() })
	for name, change := range map[string]func(*http.Request){"simple": func(*http.Request) {}, "net/http's": func(r *http.Request) { r.Header.Set("Upgrade", "x") }} {
		before := s.connections()
		r := request(t, "GET", "")
		change(r)
		_, _, err := ask(transport, r)
		if failed, _ := errors.AsType[*relay.Failure](err); failed == nil || failed.Reused || !failed.Written || s.connections() != before+1 {
			t.Errorf("%s: %#v, %d connections", name, failed, s.connections()-before)
		}
	}
}

// Who gives up is told why at once, wherever the request is, and the server sees its connection end.
func TestGivenUp(t *testing.T) {
	why := errors.New("no more patience")
	for _, where := range []string{"before", "header", "body"} {
		t.Run(where, func(t *testing.T) {
			asked, over := make(chan struct{}), make(chan struct{})
			s, transport := start(t, func(_ int, p *peer) {
				if where == "body" {
					p.say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello")
				}
				if r, _ := p.request(); r != nil {
					close(asked)
				}
				p.ended()
				close(over)
			})
			ctx, cancel := context.WithCancelCause(t.Context())
			if where == "before" {
				cancel(why)
			} else {
				go func() {
					<-asked
					cancel(why)
				}()
			}
			if _, _, err := ask(transport, request(t, "GET", "").WithContext(ctx)); !errors.Is(err, why) {
				t.Errorf("%v", err)
			}
			if where != "before" {
				<-over
			} else if s.connections() > 0 {
				t.Error("it was dialed")
			}
		})
	}
	// A body that is closed early costs the connection and no more.
	over := make(chan struct{})
	_, transport := start(t, func(n int, p *peer) {
		_, _ = p.request()
		if n == 1 {
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello")
			p.ended()
			close(over)
			return
		}
		p.say(ok)
	})
	res, err := transport.RoundTrip(request(t, "GET", ""))
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	<-over
	if _, err := res.Body.Read(make([]byte, 1)); !errors.Is(err, http.ErrBodyReadAfterClose) {
		t.Errorf("read after it was closed: %v", err)
	}
	if _, body, err := ask(transport, request(t, "GET", "")); body != "hello" || err != nil {
		t.Errorf("%q %v", body, err)
	}
}

// Idle connections are bounded in number and time.
func TestIdleIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		ended := make(chan time.Duration, 10)
		s := &server{t: t, pipes: true, script: func(_ int, p *peer) {
			for r, _ := p.request(); r != nil; r, _ = p.request() {
				time.Sleep(time.Second) // of the bubble: all are in flight at once
				p.say(ok)
			}
			ended <- time.Since(begun)
		}}
		transport := relay.NewTransport(relay.TransportConfig{Dial: s.dial, MaxIdle: 2})
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() {
				if _, _, err := ask(transport, request(t, "GET", "")); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if at := <-ended; at != time.Second {
			t.Errorf("the third ended at %s", at)
		}
		time.Sleep(400 * time.Millisecond)
		if _, _, err := ask(transport, request(t, "GET", "")); err != nil || s.connections() != 3 {
			t.Errorf("%v, %d connections", err, s.connections())
		}
		if at := <-ended; at != 2500*time.Millisecond {
			t.Errorf("the one that stayed idle ended at %s", at)
		}
		if at := <-ended; at != 3900*time.Millisecond {
			t.Errorf("the one that was used again ended at %s", at)
		}
		// Those that are in use when all is closed end with their requests.
		go func() {
			if _, _, err := ask(transport, request(t, "GET", "")); err != nil {
				t.Error(err)
			}
		}()
		synctest.Wait()
		transport.CloseIdleConnections()
		if at := <-ended; at != 4900*time.Millisecond {
			t.Errorf("the last one ended at %s", at)
		}
		s.scripts.Wait()
	})
}

// gRPC goes over h2c, and what cannot be written before its answer is read goes net/http's way.
func TestOtherRequests(t *testing.T) {
	f := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		n, err := io.Copy(w, r.Body)
		_ = http.NewResponseController(w).Flush() // trailers need an answer that is not of known length
		w.Header().Set(http.TrailerPrefix+"Got", fmt.Sprint(r.Proto, " ", n, " ", r.Trailer.Get("Sent"), " ", err))
	}))
	f.Config.Protocols = new(http.Protocols)
	f.Config.Protocols.SetHTTP1(true)
	f.Config.Protocols.SetUnencryptedHTTP2(true)
	f.Start()
	defer f.Close()
	transport := relay.NewTransport(relay.TransportConfig{MaxIdle: 2, Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", f.Listener.Addr().String())
	}})
	defer transport.CloseIdleConnections()
	large := strings.Repeat("x", 1<<20)
	for name, c := range map[string]struct {
		body   string
		change func(*http.Request)
		want   string
	}{
		"simple":  {"body", func(*http.Request) {}, "HTTP/1.1 4  <nil>"},
		"large":   {large, func(*http.Request) {}, "HTTP/1.1 1048576  <nil>"},
		"chunked": {"body", func(r *http.Request) { r.ContentLength = -1 }, "HTTP/1.1 4  <nil>"},
		"expect":  {"body", func(r *http.Request) { r.Header.Set("Expect", "100-continue") }, "HTTP/1.1 4  <nil>"},
		"trailer": {"body", func(r *http.Request) { r.ContentLength, r.Trailer = -1, http.Header{"Sent": {"yes"}} }, "HTTP/1.1 4 yes <nil>"},
		"h2": {"body", func(r *http.Request) {
			r.ProtoMajor = 2
			r.Header.Set("Content-Type", "text/plain")
		}, "HTTP/1.1 4  <nil>"},
		"grpc": {"body", func(r *http.Request) {
			r.ProtoMajor = 2
			r.Header.Set("Content-Type", "application/grpc+proto")
		}, "HTTP/2.0 4  <nil>"},
		"grpc over HTTP/1": {"body", func(r *http.Request) { r.Header.Set("Content-Type", "application/grpc") }, "HTTP/1.1 4  <nil>"},
	} {
		r := request(t, "POST", c.body)
		c.change(r)
		res, body, err := ask(transport, r)
		if err != nil || body != c.body || res.Trailer.Get("Got") != c.want {
			t.Errorf("%s: %d bytes back, %v, %v", name, len(body), res, err)
		}
	}
}

// Whatever a server says, the round trip ends, and what it gives is what net/http reads there.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{
		ok, ok + ok, "HTTP/1.1 200 OK\r\n\r\nhello", "HTTP/1.1 103 Early\r\n\r\n" + ok, "HTTP/1.1 099 x\r\n\r\n", "HTTP/1.1 101 x\r\nUpgrade: x\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nSum: 1\r\n\r\n", "HTTP/1.0 204\r\nContent-Length: 1\r\n\r\nx", "\r\n",
	} {
		f.Add([]byte(seed), false)
		f.Add([]byte(seed), true)
	}
	f.Fuzz(func(t *testing.T, answer []byte, head bool) {
		s, transport := start(t, func(_ int, p *peer) {
			if r, _ := p.request(); r != nil {
				p.say(string(answer))
			}
		})
		s.pipes = true
		method := map[bool]string{true: "HEAD", false: "GET"}[head]
		res, body, err := ask(transport, request(t, method, ""))
		if err != nil {
			return
		}
		in := bufio.NewReader(strings.NewReader(string(answer)))
		for {
			want, err := http.ReadResponse(in, &http.Request{Method: method})
			if err != nil || want.StatusCode < 100 {
				t.Fatalf("%d is no answer: %v", res.StatusCode, err)
			}
			if want.StatusCode < 200 {
				continue
			}
			if data, err := io.ReadAll(want.Body); want.StatusCode != res.StatusCode || string(data) != body || err != nil {
				t.Fatalf("%d %q, but net/http reads %d %q %v", res.StatusCode, body, want.StatusCode, data, err)
			}
			return
		}
	})
}
