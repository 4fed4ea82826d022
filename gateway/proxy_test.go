package gateway_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// h2c is a client that speaks HTTP/2 without TLS.
func (w *world) h2c() *http.Client {
	t := w.transport()
	t.Protocols = new(http.Protocols)
	t.Protocols.SetUnencryptedHTTP2(true)
	w.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

func both(t *testing.T, h http.HandlerFunc, test func(t *testing.T, w *world, c *http.Client)) {
	for _, proto := range []string{"http1", "h2c"} {
		t.Run(proto, func(t *testing.T) {
			w := newWorld(t, loopback{t}, nil)
			in, _ := w.instance(h)
			w.deploy("f", nil, 0, in)
			c := w.client
			if proto == "h2c" {
				c = w.h2c()
			}
			test(t, w, c)
		})
	}
}

// A conversation: each line comes back before the next is sent, in one request, with trailers at the end.
func TestStreamsBothWaysWithTrailers(t *testing.T) {
	echo := func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		_ = c.EnableFullDuplex()
		w.Header().Set("Trailer", "Lines")
		_ = c.Flush()
		lines := 0
		for in := bufio.NewScanner(r.Body); in.Scan(); lines++ {
			_, _ = fmt.Fprintf(w, "echo %s\n", in.Text())
			_ = c.Flush()
		}
		w.Header().Set("Lines", fmt.Sprint(lines))
		w.Header().Set(http.TrailerPrefix+"Sent", r.Trailer.Get("Sent"))
	}
	both(t, echo, func(t *testing.T, w *world, c *http.Client) {
		body, send := io.Pipe()
		req := w.request("POST", "/fn/f", body)
		req.Trailer = http.Header{"Sent": nil}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		in := bufio.NewReader(res.Body)
		for i := range 5 {
			_, _ = fmt.Fprintf(send, "%d\n", i)
			if line, err := in.ReadString('\n'); line != fmt.Sprintf("echo %d\n", i) {
				t.Fatalf("line %q, %v", line, err)
			}
		}
		req.Trailer.Set("Sent", "yes")
		_ = send.Close()
		if rest, err := io.ReadAll(in); err != nil || len(rest) > 0 {
			t.Fatalf("rest %q, %v", rest, err)
		}
		if res.Trailer.Get("Lines") != "5" || res.Trailer.Get("Sent") != "yes" {
			t.Errorf("trailers %v", res.Trailer)
		}
	})
}

// An answer with a known length still comes byte by byte.
func TestSlowAnswerIsNotHeldBack(t *testing.T) {
	next := make(chan struct{})
	both(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "3")
		_ = http.NewResponseController(w).Flush()
		for range 3 {
			<-next
			_, _ = w.Write([]byte("x"))
			_ = http.NewResponseController(w).Flush()
		}
	}, func(t *testing.T, w *world, c *http.Client) {
		res, err := c.Do(w.request("GET", "/fn/f", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		for range 3 {
			next <- struct{}{}
			if _, err := io.ReadFull(res.Body, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// An Instance that answers without reading a large body ends the exchange; the gateway is fit for the next.
func TestEarlyAnswer(t *testing.T) {
	both(t, func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 1<<20 {
			http.Error(w, "too large", http.StatusRequestEntityTooLarge)
		}
	}, func(t *testing.T, w *world, c *http.Client) {
		for range 3 {
			res, err := c.Do(w.request("POST", "/fn/f", strings.NewReader(strings.Repeat("x", 20<<20))))
			if err != nil { // the connection may be closed under the upload, as with a direct one
				continue
			}
			if _ = res.Body.Close(); res.StatusCode != http.StatusRequestEntityTooLarge {
				t.Errorf("status %d", res.StatusCode)
			}
		}
		res, err := c.Do(w.request("GET", "/fn/f", nil))
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%v %v", res, err)
		}
		_ = res.Body.Close()
	})
}

func TestLargeBodies(t *testing.T) {
	const size = 32 << 20
	both(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		n, err := io.Copy(w, r.Body)
		if n != size || err != nil {
			panic(http.ErrAbortHandler)
		}
	}, func(t *testing.T, w *world, c *http.Client) {
		res, err := c.Do(w.request("PUT", "/fn/f", io.LimitReader(zeros{}, size)))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		if n, err := io.Copy(io.Discard, res.Body); n != size || err != nil {
			t.Errorf("%d bytes back, %v", n, err)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A WebSocket's handshake is forwarded, and then bytes both ways; the slot is taken as long as it lasts.
func TestUpgrade(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	in, _ := w.instance(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Sec-WebSocket-Key") != "key" {
			http.Error(rw, "no upgrade", http.StatusBadRequest)
			return
		}
		conn, buf, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = buf.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = buf.Flush()
		_, _ = io.Copy(conn, buf)
	}))
	w.deploy("ws", &hearthv1.Scaling{Concurrency: 1, Max: 1, Queue: 1}, 0, in)
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(conn, "GET /fn/ws HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: key\r\n\r\n")
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v %v", res, err)
	}
	for i := range 3 {
		_, _ = fmt.Fprintf(conn, "frame %d\n", i)
		if line, err := r.ReadString('\n'); line != fmt.Sprintf("frame %d\n", i) {
			t.Fatalf("%q %v", line, err)
		}
	}
	w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool { return loadOf(r, "ws").GetInFlight()[in.GetId()] == 1 })
	_ = conn.Close()
	w.pool.awaitReport(t, func(r *hearthv1.ReportRequest) bool {
		l := loadOf(r, "ws")
		return l.GetRequests() == 0 && l.GetConcurrency() == 0 && len(l.GetInFlight()) == 0
	})
}

// gRPC reaches an Instance that speaks nothing but HTTP/2.
func TestGRPCGoesOverHTTP2(t *testing.T) {
	both(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		_, _ = io.Copy(w, r.Body)
		_ = http.NewResponseController(w).Flush()
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
		w.Header().Set(http.TrailerPrefix+"Proto", r.Proto+" "+r.Header.Get("Te"))
	}, func(t *testing.T, w *world, c *http.Client) {
		req := w.request("POST", "/fn/f", strings.NewReader("message"))
		req.Header.Set("Content-Type", "application/grpc+proto")
		req.Header.Set("Te", "trailers")
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		want := "HTTP/2.0 trailers"
		if c == w.client {
			want = "HTTP/1.1 trailers"
		}
		if err != nil || string(body) != "message" || res.Trailer.Get("Grpc-Status") != "0" || res.Trailer.Get("Proto") != want {
			t.Errorf("%q %v %v", body, res.Trailer, err)
		}
	})
}

// An Instance that dies in the middle: before its answer it is 502, within its answer the client sees it broken off.
func TestInstanceBreaks(t *testing.T) {
	both(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/within" {
			_, _ = w.Write([]byte("some"))
			_ = http.NewResponseController(w).Flush()
		}
		panic(http.ErrAbortHandler)
	}, func(t *testing.T, w *world, c *http.Client) {
		w.client = c
		a := w.do(w.request("POST", "/fn/f/before", strings.NewReader("x")))
		if code, _, _ := a.reason(t); a.status != http.StatusBadGateway || code != "instance_broke" {
			t.Errorf("before: %d %s", a.status, a.body)
		}
		if a := w.get("/fn/f/within"); a.err == nil || a.body != "some" {
			t.Errorf("within: %d %q %v", a.status, a.body, a.err)
		}
	})
}

// Refused connections take an endpoint out at once; nothing was sent, so the request goes elsewhere, body and all.
func TestRefusedEndpointIsReplaced(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	dead, kill := w.instance(mirror{"dead"})
	fresh, _ := w.instance(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }))
	w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		return allocated(fresh), nil
	}
	w.deploy("f", &hearthv1.Scaling{Concurrency: 1, Max: 1}, 0, dead)
	kill() // after the other has its port, or that might be the same
	for range 3 {
		if a := w.do(w.request("POST", "/fn/f", io.MultiReader(strings.NewReader("body")))); a.status != 200 || a.body != "body" {
			t.Fatalf("%d %q", a.status, a.body)
		}
	}
	if n := w.pool.allocates.Load(); n != 1 {
		t.Errorf("%d activations", n)
	}
}

func TestBrokenRequests(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	var seen atomic.Int64
	in, _ := w.instance(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		seen.Add(1)
	}))
	w.deploy("f", nil, 0, in)
	for _, raw := range []string{
		"POST /fn/f HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"POST /fn/f HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"POST /fn/f HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
		"GET /fn/f HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
		"GET /fn/f HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 100<<10) + "\r\n\r\n",
		"GET /fn/f HTTP/1.1\r\n X: y\r\n\r\n",
	} {
		conn, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		go func() { _, _ = io.WriteString(conn, raw) }()
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || res.StatusCode < 400 || res.StatusCode == 502 {
			t.Errorf("%.60q: %v %v", raw, res, err)
		}
		_ = conn.Close()
	}
}
