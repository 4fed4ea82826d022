package sidecar

import (
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httputil"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
	"github.com/hearth-serverless/hearth/sidecar/control"
)

// copyBytes is what is copied of a body at once.
const copyBytes = 16 << 10

// proxy takes a Function's requests.
type proxy struct {
	name    string
	gate    *gate
	target  *target
	buffers *relay.Buffers
	silence *log.Logger
}

func newProxy(s *control.Serve, g *gate, t *target, silence *log.Logger) *proxy {
	return &proxy{name: s.Function, gate: g, target: t, buffers: relay.NewBuffers(copyBytes), silence: silence}
}

// exchange is one request and its answer.
type exchange struct {
	*proxy
	reverse httputil.ReverseProxy
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect {
		refuse(w, http.StatusMethodNotAllowed, "method_not_allowed", "this is no forward proxy", "use another method than CONNECT")
		return
	}
	x := &exchange{proxy: p}
	if err := p.gate.enter(r.Context()); err != nil {
		x.refuse(w, r, err)
		return
	}
	defer p.gate.leave()
	if r.ProtoMajor == 1 && r.ContentLength != 0 {
		// Without it net/http reads up what is left of the body before the answer begins.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	x.reverse = httputil.ReverseProxy{
		Rewrite: rewrite, Transport: p.target.transport, ModifyResponse: x.modify, BufferPool: p.buffers, ErrorLog: p.silence, ErrorHandler: x.refuse,
	}
	x.reverse.ServeHTTP(w, r)
}

// forwarding are the headers that ReverseProxy takes off and the gateway has set.
var forwarding = []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"}

func rewrite(p *httputil.ProxyRequest) {
	relay.Rewrite(p)
	p.Out.URL.Host = "function"
	for _, name := range forwarding {
		if v, ok := p.In.Header[name]; ok {
			p.Out.Header[name] = v
		}
	}
}

func (x *exchange) modify(res *http.Response) error {
	x.reverse.FlushInterval = relay.FlushInterval(res)
	return nil
}

// refuse ends an exchange that came to no answer of the Function. What is the Function's fault ends without one: the gateway
// then sees what it would see without a sidecar.
func (x *exchange) refuse(w http.ResponseWriter, _ *http.Request, err error) {
	if !errors.Is(err, errFull) {
		panic(http.ErrAbortHandler)
	}
	refuse(w, http.StatusServiceUnavailable, "queue_full",
		fmt.Sprintf("%d requests wait for this instance of %s already, which is its bound", x.gate.queue, x.name),
		"send less at once, or raise the function's max, concurrency or queue")
}

func refuse(w http.ResponseWriter, status int, code, reason, next string) {
	no := relay.Refusal{Status: status, Code: code, Reason: reason, Next: next}
	if status == http.StatusServiceUnavailable {
		no.RetryAfter = time.Second
	}
	no.Write(w)
}
