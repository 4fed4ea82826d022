package relay

import (
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Hop passes one request on, and its answer back, as they came, less what concerns one connection only (RFC 9110, 7.6.1). It is an
// http.Handler.
//
// It is what httputil.ReverseProxy is, with less on the way: headers are copied once, nothing is parsed that nobody needs, and what
// has come of an answer goes out without timers: when there is no more to read at once. ReverseProxy does upgrades.
type Hop struct {
	Transport http.RoundTripper
	// Rewrite says where a request goes, out.URL.Host, and what else is to be changed of it. Header values are shared with in: they may be
	// replaced, and not changed.
	Rewrite func(in, out *http.Request)
	Modify  func(*http.Response) // completes an answer
	// Refuse answers a request to which there is no answer.
	Refuse   func(http.ResponseWriter, *http.Request, error)
	Buffers  *Buffers
	ErrorLog *log.Logger
}

// errAnswer is what an answer is that cannot be passed on.
var errAnswer = errors.New("the answer has a status that is none, or that nobody has asked for")

// ServeHTTP implements http.Handler. It panics with http.ErrAbortHandler when an answer breaks off that has begun.
func (h *Hop) ServeHTTP(w http.ResponseWriter, in *http.Request) {
	if upgrade := in.Header.Get("Upgrade"); upgrade != "" && !strings.EqualFold(upgrade, "h2c") {
		h.upgrade(w, in)
		return
	}
	early := &early{w: w}
	ctx := httptrace.WithClientTrace(in.Context(), &httptrace.ClientTrace{Got1xxResponse: early.answer})
	out := outgoing(in.WithContext(ctx))
	if in.ContentLength != 0 && in.Body != nil {
		body := &requestBody{content: in.Body}
		defer func() { _ = body.Close() }()
		out.Body = body
	}
	h.Rewrite(in, out)
	res, err := h.Transport.RoundTrip(out)
	early.end()
	if err == nil && (res.StatusCode < 200 || res.StatusCode > 999) {
		_ = res.Body.Close() // nobody reads it
		err = errAnswer
	}
	if err != nil {
		h.Refuse(w, out, err)
		return
	}
	h.reply(w, res)
}

// outgoing makes the request that goes on of the one that came.
func outgoing(out *http.Request) *http.Request {
	in := out.Header
	out.Header = make(http.Header, len(in)+4) // what a caller adds
	for name, values := range in {
		if !ofConnection(name) {
			out.Header[name] = values
		}
	}
	dropNamed(out.Header, in["Connection"])
	if slices.ContainsFunc(in["Te"], func(v string) bool { return hasToken(v, "trailers") }) {
		out.Header["Te"] = []string{"trailers"} // gRPC asks for it
	}
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header["User-Agent"] = []string{""} // or net/http adds its own
	}
	out.URL = address(out.URL)
	out.Body, out.Close = nil, false
	return out
}

// address is a URL whose host the caller sets: what a client sent says what is wanted, and not of whom. The query stays as it was,
// parsable or not: what it means is the Function's business.
func address(sent *url.URL) *url.URL {
	u := *sent
	u.Scheme, u.Opaque, u.User, u.Fragment, u.RawFragment = "http", "", nil, "", ""
	return &u
}

// ofConnection says whether a header is about one connection only. With an upgrade to h2c, whoever agreed would get requests past
// this hop.
func ofConnection(name string) bool {
	switch name {
	case "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer",
		"Transfer-Encoding", "Upgrade", "Http2-Settings":
		return true
	}
	return false
}

// dropNamed takes the headers off that a Connection header names.
func dropNamed(h http.Header, connection []string) {
	for _, value := range connection {
		for name := range strings.SplitSeq(value, ",") {
			h.Del(textproto.TrimString(name))
		}
	}
}

func hasToken(value, token string) bool {
	for v := range strings.SplitSeq(value, ",") {
		if strings.EqualFold(textproto.TrimString(v), token) {
			return true
		}
	}
	return false
}

// reply passes an answer back.
func (h *Hop) reply(w http.ResponseWriter, res *http.Response) {
	dropNamed(res.Header, res.Header["Connection"])
	h.Modify(res)
	header := w.Header()
	for name, values := range res.Header {
		if !ofConnection(name) {
			header[name] = values
		}
	}
	announced := len(res.Trailer)
	if announced > 0 {
		names := make([]string, 0, announced)
		for name := range res.Trailer {
			names = append(names, name)
		}
		header["Trailer"] = []string{strings.Join(names, ", ")}
	}
	w.WriteHeader(res.StatusCode)
	err := h.copy(w, res)
	_ = res.Body.Close() // which has the trailers, if it has been read to its end
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if len(res.Trailer) == 0 {
		return
	}
	_ = http.NewResponseController(w).Flush() // an answer that has a length has no trailers
	prefix := http.TrailerPrefix
	if len(res.Trailer) == announced {
		prefix = ""
	}
	for name, values := range res.Trailer {
		header[prefix+name] = values
	}
}

// copy passes the body of an answer back. What has come is not held back: it is flushed before anything may have to be waited for. So
// a small answer of known length, which commonly comes in one piece, goes out as one.
func (h *Hop) copy(w http.ResponseWriter, res *http.Response) error {
	if res.Body == http.NoBody {
		return nil
	}
	flush := http.NewResponseController(w).Flush
	if b, ok := res.Body.(*body); !ok || !b.here(res) {
		_ = flush() // a client that left is noticed when something is written
	}
	buf := h.Buffers.Get()
	defer h.Buffers.Put(buf)
	for {
		n, err := res.Body.Read(buf)
		if n > 0 {
			if _, failed := w.Write(buf[:n]); failed != nil {
				return failed
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		if n > 0 {
			_ = flush() // as above
		}
	}
}

// upgrade passes a request on that wants another protocol, and then bytes both ways.
func (h *Hop) upgrade(w http.ResponseWriter, in *http.Request) {
	reverse := httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			upgrade := p.Out.Header["Upgrade"] // it has looked whether the client means it
			body := p.Out.Body
			p.Out = outgoing(p.In.WithContext(p.Out.Context()))
			p.Out.Body = body
			if len(upgrade) > 0 {
				p.Out.Header["Connection"], p.Out.Header["Upgrade"] = []string{"Upgrade"}, upgrade
			}
			h.Rewrite(p.In, p.Out)
		},
		Transport:      h.Transport,
		ModifyResponse: func(res *http.Response) error { h.Modify(res); return nil },
		FlushInterval:  -1, BufferPool: h.Buffers, ErrorLog: h.ErrorLog, ErrorHandler: h.Refuse,
	}
	reverse.ServeHTTP(w, in)
}

// early passes 1xx answers back, but for 100, until the round trip is over, which some other goroutine of a transport may miss.
type early struct {
	w     http.ResponseWriter
	mu    sync.Mutex // guards ended, and w until then
	ended bool
}

func (e *early) answer(status int, header textproto.MIMEHeader) error {
	if status == http.StatusContinue {
		return nil // the server says so itself when the body is read, which may be now: the client would hear it twice
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended {
		return nil
	}
	h := e.w.Header()
	for name, values := range header {
		h[name] = values
	}
	e.w.WriteHeader(status)
	clear(h)
	return nil
}

func (e *early) end() {
	e.mu.Lock()
	e.ended = true
	e.mu.Unlock()
}

// requestBody is a client's body as transports see it: they may close it when they are done with it, also before the client has sent
// anything, for which closing waits; and they may read it when the request is over.
type requestBody struct {
	content io.Reader
	over    atomic.Bool
}

// Read implements io.Reader.
func (b *requestBody) Read(p []byte) (int, error) {
	if b.over.Load() {
		return 0, http.ErrBodyReadAfterClose
	}
	return b.content.Read(p)
}

// Close implements io.Closer.
func (b *requestBody) Close() error {
	b.over.Store(true)
	return nil
}

// Buffers lends buffers for copying bodies. It is an httputil.BufferPool.
type Buffers struct{ pool sync.Pool }

// NewBuffers lends buffers of this many bytes.
func NewBuffers(size int) *Buffers {
	return &Buffers{sync.Pool{New: func() any { b := make([]byte, size); return &b }}}
}

// Get lends a buffer.
func (p *Buffers) Get() []byte { return *p.pool.Get().(*[]byte) }

// Put takes one back.
func (p *Buffers) Put(b []byte) { p.pool.Put(&b) }
