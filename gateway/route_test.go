package gateway_test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/gateway"
)

// mirror answers with what it has got.
type mirror struct{ name string }

type reflection struct {
	Instance, Host, URI string
	Header              http.Header
}

func (m mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_ = json.NewEncoder(w).Encode(reflection{m.name, r.Host, r.RequestURI, r.Header})
}

func mirrored(t *testing.T, a answer) reflection {
	t.Helper()
	var r reflection
	if err := json.Unmarshal([]byte(a.body), &r); err != nil || a.status != 200 {
		t.Fatalf("status %d, body %q, err %v", a.status, a.body, a.err)
	}
	return r
}

func TestRoutes(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	a, _ := w.instance(mirror{"a"})
	b, _ := w.instance(mirror{"b"})
	w.deploy("hello", nil, 0, a)
	w.pool.set("other", func(e *hearthv1.Endpoints) {
		e.Spec.Hosts = []string{"Shop.Example.com", "localhost", "127.0.0.1", "hello.hearth.localhost", "hearth.localhost"}
		e.Instances = []*hearthv1.Instance{b}
	})
	w.settle()
	for _, c := range []struct{ host, path, instance, uri, prefix string }{
		{"hello.hearth.localhost", "/x?a=1;b", "a", "/x?a=1;b", ""},
		{"HELLO.hearth.LOCALHOST:8080", "/", "a", "/", ""},
		{"hello.hearth.localhost.", "", "a", "/", ""},
		{"shop.example.com", "/fn/hello", "b", "/fn/hello", ""},
		{"SHOP.example.com:99", "/", "b", "/", ""},
		{"localhost:8080", "/fn/hello", "a", "/", "/fn/hello"},
		{"127.0.0.1", "/fn/hello/", "a", "/", "/fn/hello"},
		{"[::1]:8080", "/fn/other/a%2Fb/../c?x=%zz", "b", "/a%2Fb/../c?x=%zz", "/fn/other"},
		{"anything", "/fn/hello//two", "a", "//two", "/fn/hello"},
		{"hello.hearth.localhost", "/fn/other/x", "a", "/fn/other/x", ""},
		{"no.such.hearth.localhost", "/", "", "", ""},
		{"none.hearth.localhost", "/fn/hello", "", "", ""},
		{"hearth.localhost", "/", "", "", ""},
		{"localhost", "/fn", "", "", ""},
		{"localhost", "/fn/", "", "", ""},
		{"localhost", "/fn/none", "", "", ""},
		{"localhost", "/fn/Hello", "", "", ""},
		{"localhost", "/fn/hel%6Co", "", "", ""},
		{"localhost", "/other/fn/hello", "", "", ""},
		{strings.Repeat("x", 3000), "/", "", "", ""},
	} {
		req := w.request("GET", "", nil)
		u, err := url.Parse("http://gateway" + c.path)
		if err != nil {
			t.Fatal(err)
		}
		req.URL, req.Host = u, c.host
		got := w.do(req)
		if c.instance == "" {
			code, reason, next := got.reason(t)
			if got.status != 404 || code != "unknown_function" || reason == "" || next == "" || len(reason) > 400 {
				t.Errorf("%s%s: %d %s", c.host, c.path, got.status, got.body)
			}
			continue
		}
		r := mirrored(t, got)
		if r.Instance != c.instance || r.URI != c.uri || r.Host != c.host || r.Header.Get("X-Forwarded-Prefix") != c.prefix {
			t.Errorf("%s%s: got %+v", c.host, c.path, r)
		}
	}
}

func TestForwardingHeaders(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	in, _ := w.instance(mirror{"a"})
	w.deploy("hello", nil, 0, in)

	got := w.get("/fn/hello")
	h := mirrored(t, got).Header
	if h.Get("X-Forwarded-For") != "127.0.0.1" || h.Get("X-Forwarded-Host") != "gateway" || h.Get("X-Forwarded-Proto") != "http" {
		t.Errorf("headers %v", h)
	}
	if id := h.Get("X-Request-Id"); id == "" || got.header.Get("X-Request-Id") != id {
		t.Errorf("request id %q, in the response %q", id, got.header.Get("X-Request-Id"))
	}

	req := w.request("GET", "/fn/hello", nil)
	for name, value := range map[string]string{
		"X-Forwarded-For": "10.1.2.3", "X-Forwarded-Host": "outer", "X-Forwarded-Proto": "https", "X-Request-Id": "mine",
		"Connection": "X-Hop, close", "X-Hop": "1", "Keep-Alive": "1", "Proxy-Connection": "1", "Upgrade": "h2c", "Http2-Settings": "AAMAAABkAAQAAP__",
	} {
		req.Header.Set(name, value)
	}
	req.Header.Set("Connection", "X-Hop, Upgrade, HTTP2-Settings")
	h = mirrored(t, w.do(req)).Header
	want := map[string]string{
		"X-Forwarded-For": "10.1.2.3, 127.0.0.1", "X-Forwarded-Host": "outer", "X-Forwarded-Proto": "https", "X-Request-Id": "mine",
		"X-Hop": "", "Keep-Alive": "", "Proxy-Connection": "", "Upgrade": "", "Connection": "", "Http2-Settings": "", "User-Agent": "Go-http-client/1.1",
	}
	for name, value := range want {
		if h.Get(name) != value {
			t.Errorf("%s: %q, want %q", name, h.Get(name), value)
		}
	}
}

func TestConnectIsRefused(t *testing.T) {
	w := newWorld(t, loopback{t}, nil)
	<-w.gw.Synced()
	req := w.request("CONNECT", "", nil)
	if got := w.do(req); got.status != http.StatusMethodNotAllowed {
		t.Errorf("status %d, err %v", got.status, got.err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, c := range []gateway.Config{{}, {Name: "x"}, {Pool: newFakePool()}, {Name: "x", Pool: newFakePool(), Domain: "a..b"}, {Name: "x", Pool: newFakePool(), Domain: "a b"}} {
		if _, err := gateway.New(c); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}

func FuzzRoute(f *testing.F) {
	for _, s := range [][2]string{
		{"hello.hearth.localhost:80", "/"}, {"x", "/fn/hello/a%2fb"}, {"[::1]:1", "/fn/%68ello"}, {"", ""}, {"a..b", "/fn//"},
		{"hello.hearth.localhost", "/fn/a/../../b"}, {"x", "/fn/hello%2f"}, {"x", "*"}, {"x", "/fn/hello?x"},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, host, path string) {
		u, err := url.ParseRequestURI(path)
		if err != nil {
			return
		}
		r, out := gateway.ParseRoute(host, u, gateway.DefaultDomain)
		if r.Name != "" && !gateway.IsLabel(r.Name) {
			t.Fatalf("name %q", r.Name)
		}
		if r.Prefix != "" && (r.ByHost || r.Prefix != "/fn/"+r.Name) {
			t.Fatalf("route %+v", r)
		}
		whole := u.EscapedPath()
		if whole == "" {
			whole = "/"
		}
		rest := strings.TrimPrefix(whole, r.Prefix)
		if rest == "" {
			rest = "/"
		}
		if got := out.EscapedPath(); got != rest {
			t.Fatalf("%q behind %q became %q, want %q", path, r.Prefix, got, rest)
		}
	})
}
