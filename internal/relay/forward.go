package relay

import (
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"
)

const (
	smallAnswerBytes = 32 << 10
	smallAnswerTime  = 2 * time.Millisecond
)

// Rewrite prepares the request of a hop: ReverseProxy has taken off hop-by-hop headers. The caller says where it goes, and puts
// back what it wants of X-Forwarded-* and Forwarded.
func Rewrite(p *httputil.ProxyRequest) {
	u := p.Out.URL
	u.Scheme, u.Opaque, u.User, u.Fragment = "http", "", nil, ""
	u.RawQuery = p.In.URL.RawQuery // as it was, parsable or not: what it means is the Function's business
	p.Out.Trailer = p.In.Trailer   // the same map: its values come at the end of the body
	out := p.Out.Header
	if strings.EqualFold(out.Get("Upgrade"), "h2c") {
		// Whoever agreed would get requests past this hop.
		out.Del("Upgrade")
		out.Del("Connection")
		out.Del("Http2-Settings")
	}
}

// FlushInterval is how long parts of an answer may be held back. Streams are flushed at once. A small answer of known length
// commonly is one piece, and then is one write.
func FlushInterval(res *http.Response) time.Duration {
	if n := res.ContentLength; n >= 0 && n <= smallAnswerBytes {
		return smallAnswerTime
	}
	return -1
}

// needsHTTP2 tells whether a request has to go on over HTTP/2: gRPC needs it all the way. Everything else takes HTTP/1.1, which
// every Function speaks.
func needsHTTP2(r *http.Request) bool {
	return r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")
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
