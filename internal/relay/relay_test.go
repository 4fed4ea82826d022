package relay_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"strings"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

// What a client sends goes on as it was, and nothing of it decides where it goes.
func TestRewrite(t *testing.T) {
	for _, sent := range []string{"/a%2fb//c/../d?x=%zz;y", "/?a=1&a=2", "/?", "*", "http://user:pass@elsewhere.example:99/p?q#f"} {
		in := httptest.NewRequest(http.MethodGet, "/", nil)
		u, err := in.URL.Parse(sent)
		if err != nil {
			t.Fatal(err)
		}
		in.URL = u
		in.Trailer = http.Header{"Sum": nil}
		p := &httputil.ProxyRequest{In: in, Out: in.Clone(t.Context())}
		p.Out.URL.RawQuery = "what ReverseProxy made of it"
		relay.Rewrite(p)
		out := p.Out.URL
		if out.Scheme != "http" || out.User != nil || out.Opaque != "" || out.Fragment != "" {
			t.Errorf("%s: goes to %#v", sent, out)
		}
		if out.RawQuery != in.URL.RawQuery || out.EscapedPath() != in.URL.EscapedPath() {
			t.Errorf("%s has become %s", sent, out)
		}
		in.Trailer.Set("Sum", "1") // as it comes when the body has been read
		if p.Out.Trailer.Get("Sum") != "1" {
			t.Errorf("%s: the trailer does not go on", sent)
		}
	}
}

// An upgrade to HTTP/2 would lead past the hop; others pass.
func TestUpgrades(t *testing.T) {
	for upgrade, passes := range map[string]bool{"h2c": false, "H2C": false, "websocket": true} {
		in := httptest.NewRequest(http.MethodGet, "/", nil)
		for name, value := range map[string]string{"Upgrade": upgrade, "Connection": "Upgrade", "Http2-Settings": "AAMAAABk"} {
			in.Header.Set(name, value)
		}
		p := &httputil.ProxyRequest{In: in, Out: in.Clone(t.Context())}
		relay.Rewrite(p)
		for _, name := range []string{"Upgrade", "Connection", "Http2-Settings"} {
			if got := p.Out.Header.Get(name) != ""; got != passes {
				t.Errorf("%s: %s is there: %t", upgrade, name, got)
			}
		}
		if in.Header.Get("Upgrade") != upgrade {
			t.Errorf("%s: the client's request was changed", upgrade)
		}
	}
}

func TestFlushInterval(t *testing.T) {
	for length, atOnce := range map[int64]bool{-1: true, 0: false, 1: false, 32 << 10: false, 32<<10 + 1: true, 1 << 40: true} {
		if got := relay.FlushInterval(&http.Response{ContentLength: length}); (got < 0) != atOnce || got == 0 {
			t.Errorf("%d bytes: %v", length, got)
		}
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
