package sidecar

import (
	"context"
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

// errTooLate is the cause of a context whose request got no first byte in time.
var errTooLate = errors.New("no first byte in time")

// proxy takes a Function's requests.
type proxy struct {
	name    string
	timeout time.Duration
	gate    *gate
	target  *target
	buffers *relay.Buffers
	silence *log.Logger
}

func newProxy(s *control.Serve, g *gate, t *target, silence *log.Logger) *proxy {
	return &proxy{name: s.Function, timeout: s.Deadline(), gate: g, target: t, buffers: relay.NewBuffers(copyBytes), silence: silence}
}

// exchange is one request and its answer.
type exchange struct {
	*proxy
	reverse httputil.ReverseProxy
	timer   *time.Timer // to errTooLate; nil if there is no bound
	turn    bool        // it has had its turn
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect {
		refuse(w, http.StatusMethodNotAllowed, "method_not_allowed", "this is no forward proxy", "use another method than CONNECT")
		return
	}
	x := &exchange{proxy: p}
	if p.timeout > 0 {
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		x.timer = time.AfterFunc(p.timeout, func() { cancel(errTooLate) })
		defer x.timer.Stop()
		r = r.WithContext(ctx)
	}
	if err := p.gate.enter(r.Context()); err != nil {
		x.refuse(w, r, err)
		return
	}
	defer p.gate.leave()
	x.turn = true
	if r.ProtoMajor == 1 && r.ContentLength != 0 {
		// Without it net/http reads up what is left of the body before the answer begins.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	x.reverse = httputil.ReverseProxy{
		Rewrite: rewrite, Transport: x, ModifyResponse: x.modify, BufferPool: p.buffers, ErrorLog: p.silence, ErrorHandler: x.refuse,
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

// RoundTrip sends the request to the Function.
func (x *exchange) RoundTrip(r *http.Request) (*http.Response, error) {
	transport := x.target.plain
	if relay.NeedsHTTP2(r) {
		transport = x.target.grpc
	}
	res, err := transport.RoundTrip(r)
	if err == nil && x.timer != nil && !x.timer.Stop() {
		_ = res.Body.Close() // nobody reads it
		return nil, errTooLate
	}
	return res, err
}

func (x *exchange) modify(res *http.Response) error {
	x.reverse.FlushInterval = relay.FlushInterval(res)
	return nil
}

// refuse ends an exchange that came to no answer of the Function. What is the Function's fault ends without one: the gateway
// then sees what it would see without a sidecar.
func (x *exchange) refuse(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case errors.Is(err, errFull):
		refuse(w, http.StatusServiceUnavailable, "queue_full",
			fmt.Sprintf("%d requests wait for this instance of %s already, which is its bound", x.gate.queue, x.name),
			"send less at once, or raise the function's max, concurrency or queue")
	case errors.Is(err, errTooLate) || errors.Is(context.Cause(r.Context()), errTooLate):
		where := "its instance was not free"
		if x.turn {
			where = "its instance began no answer"
		}
		refuse(w, http.StatusGatewayTimeout, "timeout", fmt.Sprintf("%s: %s within its time-out of %s", x.name, where, x.timeout),
			"see the function's log; raise its timeout if it needs longer")
	default:
		panic(http.ErrAbortHandler)
	}
}

func refuse(w http.ResponseWriter, status int, code, reason, next string) {
	no := relay.Refusal{Status: status, Code: code, Reason: reason, Next: next}
	if status == http.StatusServiceUnavailable {
		no.RetryAfter = time.Second
	}
	no.Write(w)
}
