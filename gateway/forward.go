package gateway

import (
	"crypto/rand"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// rewrite turns the client's request into the Instance's. What a client says of whom it forwards for stays: it may be a proxy itself.
func (x *exchange) rewrite(from, to *http.Request) {
	x.route.strip(to.URL)
	in, out := from.Header, to.Header
	if client, _, err := net.SplitHostPort(from.RemoteAddr); err == nil {
		if prior := in["X-Forwarded-For"]; len(prior) > 0 {
			client = strings.Join(prior, ", ") + ", " + client
		}
		out["X-Forwarded-For"] = []string{client}
	}
	proto := "http"
	if from.TLS != nil {
		proto = "https"
	}
	keep(out, in, "X-Forwarded-Host", from.Host)
	keep(out, in, "X-Forwarded-Proto", proto)
	if x.route.prefix != "" {
		out.Set("X-Forwarded-Prefix", x.route.prefix)
	}
	if out.Get("X-Request-Id") == "" {
		out.Set("X-Request-Id", rand.Text())
	}
}

func keep(out, in http.Header, name, otherwise string) {
	if v := in[name]; len(v) > 0 {
		out[name] = v
		return
	}
	out.Set(name, otherwise)
}

// modify completes the Instance's answer.
func (x *exchange) modify(res *http.Response) {
	x.status = res.StatusCode
	if res.Header.Get("X-Request-Id") == "" {
		res.Header.Set("X-Request-Id", res.Request.Header.Get("X-Request-Id"))
	}
	if x.traced {
		x.awaitExplanation()
		theirs := res.Header["Server-Timing"]
		res.Header["Server-Timing"] = append([]string{formatTiming(x.phases())}, theirs...)
	}
}

// awaitExplanation gives the reply of an activation a moment to arrive, when its Instance has come by a Watch event.
func (x *exchange) awaitExplanation() {
	if !x.lease.awaited || x.function.startOf(x.lease.endpoint) != nil {
		return
	}
	t := time.NewTimer(explainTime)
	defer t.Stop()
	select {
	case <-x.lease.endpoint.known:
	case <-t.C:
	}
}

// phases of the way to the first byte. The start of the Instance is among them only for a request that waited for it.
func (x *exchange) phases() []Phase {
	phases := []Phase{{Name: "total", Duration: x.answered.Sub(x.arrived)}}
	if x.lease.waited {
		phases = append(phases, Phase{Name: "queue", Duration: x.granted.Sub(x.arrived)})
	}
	if x.lease.awaited {
		if s := x.function.startOf(x.lease.endpoint); s != nil {
			shift := s.begun.Sub(x.arrived)
			phases = append(phases, Phase{Name: "allocate", Offset: shift, Duration: s.ended.Sub(s.begun)})
			for _, p := range s.phases {
				p.Offset += shift
				phases = append(phases, p)
			}
		}
	}
	return append(phases, Phase{Name: "first_byte", Offset: x.sent.Sub(x.arrived), Duration: x.answered.Sub(x.sent)})
}

// requestBody notes what a transport did with a client's body: whether it has begun to read, for until then the request can
// go elsewhere and the body must stay open; and whether reading failed, which is the client's fault and not the Instance's.
type requestBody struct {
	io.ReadCloser
	begun  atomic.Bool
	ended  atomic.Pointer[time.Time] // when all of it had been read
	failed atomic.Pointer[error]
}

func (b *requestBody) Read(p []byte) (int, error) {
	b.begun.Store(true)
	n, err := b.ReadCloser.Read(p)
	switch {
	case err == io.EOF:
		now := time.Now()
		b.ended.CompareAndSwap(nil, &now)
	case err != nil:
		b.failed.Store(&err)
	}
	return n, err
}

// endedBy says whether all of the body had been read at a time; one that there is not had been.
func (b *requestBody) endedBy(t time.Time) bool {
	if b == nil {
		return true
	}
	ended := b.ended.Load()
	return ended != nil && ended.Before(t)
}

func (b *requestBody) Close() error {
	if !b.begun.Load() {
		return nil
	}
	return b.ReadCloser.Close()
}
