package sidecar_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A conversation: each line comes back before the next is sent, in one request, with trailers at both ends.
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
	both(t, echo, func(t *testing.T, url string, c *http.Client) {
		body, send := io.Pipe()
		r, _ := http.NewRequest(http.MethodPost, url, body)
		r.Trailer = http.Header{"Sent": nil}
		res, err := c.Do(r)
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
		r.Trailer.Set("Sent", "yes")
		_ = send.Close()
		if rest, err := io.ReadAll(in); err != nil || len(rest) > 0 {
			t.Fatalf("rest %q, %v", rest, err)
		}
		if res.Trailer.Get("Lines") != "5" || res.Trailer.Get("Sent") != "yes" {
			t.Errorf("trailers %v", res.Trailer)
		}
	})
}

// gRPC reaches a Function that speaks HTTP/2, over HTTP/2; other requests come over HTTP/1.1.
func TestProtocols(t *testing.T) {
	both(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(w, r.Body)
		_ = http.NewResponseController(w).Flush()
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
		w.Header().Set(http.TrailerPrefix+"Proto", r.Proto+" "+r.Header.Get("Te"))
	}, func(t *testing.T, url string, c *http.Client) {
		_, h2 := c.Transport.(*http.Transport)
		h2 = h2 && c.Transport.(*http.Transport).Protocols != nil
		for kind, want := range map[string]string{"application/grpc+proto": "HTTP/2.0 trailers", "text/plain": "HTTP/1.1 trailers"} {
			if !h2 {
				want = "HTTP/1.1 trailers"
			}
			r, _ := http.NewRequest(http.MethodPost, url, strings.NewReader("message"))
			r.Header.Set("Content-Type", kind)
			r.Header.Set("Te", "trailers")
			res, err := c.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if err != nil || string(body) != "message" || res.Trailer.Get("Grpc-Status") != "0" || res.Trailer.Get("Proto") != want {
				t.Errorf("%s: %q %v, want %s: %v", kind, body, res.Trailer, want, err)
			}
		}
	})
}

// The request comes as it was sent, less what is of one connection only.
func TestHeaders(t *testing.T) {
	both(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s %s %s\n", r.Method, r.Host, r.RequestURI)
		_ = r.Header.Write(w)
	}, func(t *testing.T, url string, c *http.Client) {
		r, _ := http.NewRequest("BREW", url+"/a%2fb//c/../d?x=%zz;y", nil)
		r.Host = "pot.example.org"
		sent := map[string]string{
			"X-Forwarded-For": "192.0.2.7, 192.0.2.8", "X-Forwarded-Host": "front.example.org", "X-Forwarded-Proto": "https",
			"X-Forwarded-Prefix": "/fn/f", "Forwarded": "for=192.0.2.9", "X-Request-Id": "id", "User-Agent": "teapot", "Cookie": "a=b; c=d",
		}
		for name, value := range sent {
			r.Header.Set(name, value)
		}
		if c.Transport.(*http.Transport).Protocols == nil { // HTTP/2 has none of these
			r.Header.Set("Connection", "X-Mine")
			r.Header.Set("X-Mine", "1")
			r.Header.Set("Keep-Alive", "1")
		}
		r.Header.Set("Proxy-Authorization", "Basic eDp5")
		a := do(c, r)
		if a.err != nil || !strings.HasPrefix(a.body, "BREW pot.example.org /a%2fb//c/../d?x=%zz;y\n") {
			t.Fatalf("%q %v", a.body, a.err)
		}
		for name, value := range sent {
			if !strings.Contains(a.body, name+": "+value+"\r\n") {
				t.Errorf("%s is not %q in %q", name, value, a.body)
			}
		}
		for _, name := range []string{"X-Mine", "Keep-Alive", "Proxy-Authorization", "Accept-Encoding"} {
			if strings.Contains(a.body, name+":") {
				t.Errorf("%s has come through: %q", name, a.body)
			}
		}
	})
}

func TestLargeBodies(t *testing.T) {
	const size = 32 << 20
	both(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		if n, err := io.Copy(w, r.Body); n != size || err != nil {
			panic(http.ErrAbortHandler)
		}
	}, func(t *testing.T, url string, c *http.Client) {
		r, _ := http.NewRequest(http.MethodPut, url, io.LimitReader(zeros{}, size))
		res, err := c.Do(r)
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

// A Function that refuses by its header alone never gets the body, and the client never sends it.
func TestExpectContinue(t *testing.T) {
	w := newWorld(t)
	at, _ := w.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			http.Error(w, "no", http.StatusExpectationFailed)
			return
		}
		_, _ = io.Copy(w, r.Body)
	}), nil)
	for path, want := range map[string]string{"/yes": "HTTP/1.1 100 Continue\r\n", "/no": "HTTP/1.1 417 Expectation Failed\r\n"} {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(conn, "POST "+path+" HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
		in := bufio.NewReader(conn)
		line, err := in.ReadString('\n')
		if err != nil || line != want {
			t.Errorf("%s: %q %v", path, line, err)
		}
		if path == "/yes" {
			_, _ = in.ReadString('\n')
			_, _ = io.WriteString(conn, "body")
			res, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			if body, err := io.ReadAll(res.Body); string(body) != "body" {
				t.Errorf("%q %v", body, err)
			}
		}
		_ = conn.Close()
	}
}

// A WebSocket's handshake is forwarded, and then bytes both ways, until one side closes.
func TestUpgrade(t *testing.T) {
	w := newWorld(t)
	at, _ := w.serve(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Sec-WebSocket-Key") != "key" {
			http.Error(rw, "no upgrade: "+r.Header.Get("Upgrade"), http.StatusBadRequest)
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
	}), nil)
	conn, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: key\r\n\r\n")
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
	_ = conn.Close()
	eventually(t, "the connection that was taken over is over", func() bool {
		w.hangUp()
		w.connect()
		return w.agent.Status().InFlight == 0
	})
	// Another protocol than HTTP/1.1 would get past the limits.
	up, _ := http.NewRequest(http.MethodGet, "http://"+at, nil)
	up.Header.Set("Connection", "Upgrade, HTTP2-Settings")
	up.Header.Set("Upgrade", "h2c")
	up.Header.Set("HTTP2-Settings", "AAMAAABkAAQAAP__")
	if a := do(client(t, false), up); a.body != "no upgrade: \n" {
		t.Errorf("%d %q %v", a.status, a.body, a.err)
	}
}

// A client that leaves ends its request in the Function.
func TestCancel(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan struct{})
	both(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		begun <- struct{}{}
		<-r.Context().Done()
		ended <- struct{}{}
	}, func(t *testing.T, url string, c *http.Client) {
		r, _ := http.NewRequest(http.MethodPost, url, strings.NewReader("body"))
		ctx, cancel := timed(t)
		over := make(chan answer, 1)
		go func() { over <- do(c, r.WithContext(ctx)) }()
		<-begun
		cancel()
		<-ended
		if a := <-over; a.err == nil {
			t.Errorf("an answer: %d %q", a.status, a.body)
		}
	})
}

// A Function that breaks off, or is not there, looks as it would without a sidecar: nothing is answered.
func TestFunctionBreaks(t *testing.T) {
	both(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/within" {
			_, _ = w.Write([]byte("some"))
			_ = http.NewResponseController(w).Flush()
		}
		panic(http.ErrAbortHandler)
	}, func(t *testing.T, url string, c *http.Client) {
		if a := do(c, must(http.NewRequest(http.MethodPost, url+"/before", strings.NewReader("x")))); a.err == nil {
			t.Errorf("before: %d %q", a.status, a.body)
		}
		if a := get(c, url+"/within"); a.err == nil || a.body != "some" {
			t.Errorf("within: %d %q %v", a.status, a.body, a.err)
		}
	})
}

func TestBrokenRequests(t *testing.T) {
	w := newWorld(t)
	at, _ := w.serve(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			t.Errorf("the function got %s %s", r.Method, r.URL)
		}
	}), nil)
	for _, raw := range []string{
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na",
		"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 100<<10) + "\r\n\r\n",
		"GET / HTTP/1.1\r\n X: y\r\n\r\n",
		"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n",
	} {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		go func() { _, _ = io.WriteString(conn, raw) }()
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil && res.StatusCode < 400 || isTimeout(err) {
			t.Errorf("%.60q: %v %v", raw, res, err)
		}
		_ = conn.Close()
	}
}
