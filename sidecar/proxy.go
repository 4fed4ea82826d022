package sidecar

import (
	"errors"
	"fmt"
	"log"
	"net/http"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
	"github.com/hearth-serverless/hearth/sidecar/control"
)

// copyBytes is what is copied of a body at once.
const copyBytes = 16 << 10

// proxy takes a Function's requests.
type proxy struct {
	name string
	gate *gate
	hop  relay.Hop
}

func newProxy(s *control.Serve, g *gate, t *target, silence *log.Logger) *proxy {
	p := &proxy{name: s.Function, gate: g}
	p.hop = relay.Hop{
		Transport: t.transport, Rewrite: func(_, out *http.Request) { out.URL.Host = "function" }, Modify: func(*http.Response) {},
		Refuse: p.refuse, Buffers: relay.NewBuffers(copyBytes), ErrorLog: silence,
	}
	return p
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect {
		refuse(w, http.StatusMethodNotAllowed, "method_not_allowed", "this is no forward proxy", "use another method than CONNECT")
		return
	}
	if err := p.gate.enter(r.Context()); err != nil {
		p.refuse(w, r, err)
		return
	}
	defer p.gate.leave()
	if r.ProtoMajor == 1 && r.ContentLength != 0 {
		// Without it net/http reads up what is left of the body before the answer begins.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	p.hop.ServeHTTP(w, r)
}

// refuse ends an exchange that came to no answer of the Function. What is the Function's fault ends without one: the gateway
// then sees what it would see without a sidecar.
func (p *proxy) refuse(w http.ResponseWriter, _ *http.Request, err error) {
	if !errors.Is(err, errFull) {
		panic(http.ErrAbortHandler)
	}
	refuse(w, http.StatusServiceUnavailable, "queue_full",
		fmt.Sprintf("%d requests wait for this instance of %s already, which is its bound", p.gate.queue, p.name),
		"send less at once, or raise the function's max, concurrency or queue")
}

func refuse(w http.ResponseWriter, status int, code, reason, next string) {
	no := relay.Refusal{Status: status, Code: code, Reason: reason, Next: next}
	if status == http.StatusServiceUnavailable {
		no.RetryAfter = time.Second
	}
	no.Write(w)
}
