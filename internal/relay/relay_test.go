package relay_test

import (
	"encoding/json"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

// roundTrip is a transport.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func hop(transport http.RoundTripper) *relay.Hop {
	return &relay.Hop{
		Transport: transport, Buffers: relay.NewBuffers(1 << 10), Rewrite: func(_, out *http.Request) { out.URL.Host = "function" },
		Modify: func(res *http.Response) { res.Header["X-Modified"] = []string{"1"} },
		Refuse: func(w http.ResponseWriter, _ *http.Request, err error) {
			(&relay.Refusal{Status: http.StatusBadGateway, Code: "broken", Reason: err.Error()}).Write(w)
		},
	}
}

// answer is one of this body.
func answer(body string) *http.Response {
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body))}
}

// What a client sends goes on as it was, and nothing of it decides where it goes.
func TestAddresses(t *testing.T) {
	for _, sent := range []string{"/a%2fb//c/../d?x=%zz;y", "/?a=1&a=2", "/?", "*", "http://user:pass@elsewhere.example:99/p?q#f"} {
		in := httptest.NewRequest(http.MethodGet, "/", nil)
		u, err := in.URL.Parse(sent)
		if err != nil {
			t.Fatal(err)
		}
		in.URL = u
		in.Trailer = http.Header{"Sum": nil}
		hop(roundTrip(func(out *http.Request) (*http.Response, error) {
			if u := out.URL; u.Scheme != "http" || u.Host != "function" || u.User != nil || u.Opaque != "" || u.Fragment != "" {
				t.Errorf("%s: goes to %#v", sent, u)
			}
			if out.URL.RawQuery != in.URL.RawQuery || out.URL.EscapedPath() != in.URL.EscapedPath() || out.Host != in.Host {
				t.Errorf("%s has become %s of %s", sent, out.URL, out.Host)
			}
			in.Trailer.Set("Sum", "1") // as it comes when the body has been read
			if out.Trailer.Get("Sum") != "1" {
				t.Errorf("%s: the trailer does not go on", sent)
			}
			return answer(""), nil
		})).ServeHTTP(httptest.NewRecorder(), in)
	}
}

// What is of one connection only stays behind, both ways, and everything else goes on; nobody's headers are changed.
func TestHeaders(t *testing.T) {
	of := func() http.Header {
		return http.Header{
			"Connection": {"close, X-Mine", "x-other"}, "X-Mine": {"1"}, "X-Other": {"1"}, "Keep-Alive": {"1"}, "Proxy-Connection": {"1"},
			"Proxy-Authenticate": {"1"}, "Proxy-Authorization": {"1"}, "Te": {"gzip, Trailers"}, "Trailer": {"X"}, "Transfer-Encoding": {"x"},
			"Upgrade": {"h2c"}, "Http2-Settings": {"AAMAAABk"},
			"Cookie": {"a=b", "c=d"}, "Forwarded": {"for=192.0.2.9"}, "X-Forwarded-For": {"192.0.2.7"}, "Empty": {""},
		}
	}
	rest := http.Header{"Cookie": {"a=b", "c=d"}, "Forwarded": {"for=192.0.2.9"}, "X-Forwarded-For": {"192.0.2.7"}, "Empty": {""}}
	in := httptest.NewRequest(http.MethodGet, "/", nil)
	in.Header = of()
	w := httptest.NewRecorder()
	hop(roundTrip(func(out *http.Request) (*http.Response, error) {
		want := rest.Clone()
		want["Te"], want["User-Agent"] = []string{"trailers"}, []string{""} // so that net/http adds none of its own
		if !maps.EqualFunc(out.Header, want, slices.Equal) {
			t.Errorf("the function gets %v", out.Header)
		}
		res := answer("body")
		res.Header = of()
		return res, nil
	})).ServeHTTP(w, in)
	want := rest.Clone()
	want["X-Modified"] = []string{"1"}
	if got := w.Result().Header; !maps.EqualFunc(got, want, slices.Equal) || w.Body.String() != "body" {
		t.Errorf("the client gets %v, %q", got, w.Body)
	}
	if !maps.EqualFunc(in.Header, of(), slices.Equal) {
		t.Errorf("the client's request was changed: %v", in.Header)
	}
}

// An upgrade goes on with what it needs, if the client means it.
func TestUpgrades(t *testing.T) {
	for connection, passes := range map[string]bool{"keep-alive, Upgrade": true, "keep-alive": false} {
		in := httptest.NewRequest(http.MethodGet, "/", nil)
		in.Header = http.Header{"Upgrade": {"websocket"}, "Connection": {connection}, "Sec-Websocket-Key": {"key"}, "X-Forwarded-For": {"192.0.2.7"}}
		w := httptest.NewRecorder()
		hop(roundTrip(func(out *http.Request) (*http.Response, error) {
			h := out.Header
			if got := h.Get("Upgrade") == "websocket" && h.Get("Connection") == "Upgrade"; got != passes {
				t.Errorf("%s: %v", connection, h)
			}
			if h.Get("Sec-Websocket-Key") != "key" || h.Get("X-Forwarded-For") != "192.0.2.7" || out.URL.Host != "function" {
				t.Errorf("%s: %v to %s", connection, h, out.URL)
			}
			return answer("no"), nil
		})).ServeHTTP(w, in)
		if w.Body.String() != "no" || w.Header().Get("X-Modified") == "" {
			t.Errorf("%s: %q %v", connection, w.Body, w.Header())
		}
	}
}

// An answer of no status that there is, or of one that nobody has asked for, is none.
func TestStatus(t *testing.T) {
	for status, want := range map[int]int{99: 502, 101: 502, 199: 502, 200: 200, 599: 599, 999: 999, 1000: 502} {
		res := answer("")
		res.StatusCode = status
		w := httptest.NewRecorder()
		hop(roundTrip(func(*http.Request) (*http.Response, error) { return res, nil })).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
		if w.Code != want {
			t.Errorf("%d becomes %d", status, w.Code)
		}
	}
}

// steps is a body that comes in parts; at each it tells what had been flushed when it was asked for.
type steps struct {
	w     *httptest.ResponseRecorder
	parts []string
	err   error
	t     *testing.T
	sent  int
}

func (s *steps) Read(p []byte) (int, error) {
	if !s.w.Flushed || s.w.Body.Len() != s.sent {
		s.t.Errorf("%d bytes were passed on of %d, flushed: %t", s.w.Body.Len(), s.sent, s.w.Flushed)
	}
	s.w.Flushed = false
	if len(s.parts) == 0 {
		return 0, s.err
	}
	n := copy(p, s.parts[0])
	s.parts, s.sent = s.parts[1:], s.sent+n
	return n, nil
}

// Nothing that has come is held back while more is waited for, whatever the length; an answer that breaks off does so for the client.
func TestStreams(t *testing.T) {
	for _, length := range []int64{-1, 3, 1 << 20} {
		for name, end := range map[string]error{"whole": io.EOF, "broken": io.ErrUnexpectedEOF} {
			w := httptest.NewRecorder()
			var recovered any
			func() {
				defer func() { recovered = recover() }()
				hop(roundTrip(func(*http.Request) (*http.Response, error) {
					res := answer("")
					res.Body, res.ContentLength = io.NopCloser(&steps{w: w, parts: []string{"a", "b", "c"}, err: end, t: t}), length
					return res, nil
				})).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
			}()
			if (recovered == http.ErrAbortHandler) != (name == "broken") || w.Body.String() != "abc" { //nolint:errorlint // it is what net/http compares
				t.Errorf("%s: %q, %v", name, w.Body, recovered)
			}
		}
	}
}

// 1xx answers are passed on, with their own headers alone, as they come; not 100, which is between two hops.
func TestEarly(t *testing.T) {
	front := httptest.NewServer(hop(roundTrip(func(out *http.Request) (*http.Response, error) {
		trace := httptrace.ContextClientTrace(out.Context())
		for _, status := range []int{100, 103, 102} {
			if err := trace.Got1xxResponse(status, textproto.MIMEHeader{"Early": {"1"}}); err != nil {
				return nil, err
			}
		}
		return answer("body"), nil
	})))
	defer front.Close()
	var got []int
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(status int, h textproto.MIMEHeader) error {
		got = append(got, status)
		if h.Get("Early") != "1" {
			t.Errorf("%d: %v", status, h)
		}
		return nil
	}})
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, front.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := front.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	if !slices.Equal(got, []int{103, 102}) || res.Header.Get("Early") != "" {
		t.Errorf("%v, then %v", got, res.Header)
	}
}

// writes counts what goes out on a connection.
type writes struct {
	net.Conn
	n *atomic.Int64
}

func (w writes) Write(b []byte) (int, error) { w.n.Add(1); return w.Conn.Write(b) }

type counting struct {
	net.Listener
	n *atomic.Int64
}

func (l counting) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return writes{c, l.n}, err
}

// A small answer that came in one piece goes out in one.
func TestOnePiece(t *testing.T) {
	_, transport := start(t, func(_ int, p *peer) {
		for r, _ := p.request(); r != nil; r, _ = p.request() {
			p.say(ok)
		}
	})
	var n atomic.Int64
	front := httptest.NewUnstartedServer(hop(transport))
	front.Listener = counting{front.Listener, &n}
	front.Start()
	defer front.Close()
	for range 10 {
		res, err := front.Client().Get(front.URL)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if string(body) != "hello" || err != nil {
			t.Errorf("%q %v", body, err)
		}
	}
	if n.Load() != 10 {
		t.Errorf("%d writes", n.Load())
	}
}

func TestBuffers(t *testing.T) {
	p := relay.NewBuffers(100)
	for range 3 {
		b := p.Get()
		if len(b) != 100 {
			t.Fatalf("%d bytes", len(b))
		}
		p.Put(b)
	}
}

// A refusal is JSON whatever its reason holds, which is bounded.
func TestRefusal(t *testing.T) {
	long := strings.Repeat("x", 3<<10)
	for name, c := range map[string]struct {
		no         relay.Refusal
		retryAfter string
		reason     string
	}{
		"plain":    {relay.Refusal{Status: 503, Code: "queue_full", Reason: "many", Next: "wait", RetryAfter: 1500 * time.Millisecond}, "2", "many"},
		"no retry": {relay.Refusal{Status: 405, Code: "method", Reason: "a \"quoted\"\r\n<b>", Next: "x"}, "", "a \"quoted\"\r\n<b>"},
		"long":     {relay.Refusal{Status: 502, Code: "broken", Reason: long, Next: "x"}, "", long[:2<<10] + "…"},
	} {
		w := httptest.NewRecorder()
		c.no.Write(w)
		var said struct {
			Error, Reason string
			Next          string `json:"next_step"`
		}
		if err := json.Unmarshal(w.Body.Bytes(), &said); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if w.Code != c.no.Status || said.Error != c.no.Code || said.Reason != c.reason || said.Next != c.no.Next {
			t.Errorf("%s: %d %+v", name, w.Code, said)
		}
		h := w.Header()
		if h.Get("Content-Type") != "application/json" || h.Get("Cache-Control") != "no-store" || h.Get("Retry-After") != c.retryAfter {
			t.Errorf("%s: %v", name, h)
		}
	}
}
