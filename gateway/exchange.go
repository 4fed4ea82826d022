package gateway

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

const (
	maxAttempts  = 5        // to reach an Instance that was believed to be well
	maxBodyBytes = 64 << 10 // of a body that is read while its request waits
	maxHeldBytes = 64 << 20 // of all of them
	// explainTime is how long a traced response waits for what is known of its start, when a Watch event was faster than the
	// reply that brings it.
	explainTime = 20 * time.Millisecond
)

// errTooLate is the cause of a context whose request got no first byte in time.
var errTooLate = errors.New("no first byte in time")

// exchange is one request and its answer. It is its hop's transport, so that choosing an Instance, and choosing
// again when nothing could be sent, is part of a round trip.
type exchange struct {
	gateway  *Gateway
	function *function
	route    route
	arrived  time.Time
	timeout  time.Duration
	timer    *time.Timer // to errTooLate; stopped by the first byte

	lease    lease
	held     int64 // bytes taken from gateway.bodies
	body     *requestBody
	broke    int       // connections that broke before an answer
	status   int       // answered; until then what a panic makes of it
	granted  time.Time // the first slot
	sent     time.Time // to the Instance that answered
	answered time.Time // first byte
	traced   bool
}

func newExchange(g *Gateway, f *function, to route, arrived time.Time) *exchange {
	return &exchange{gateway: g, function: f, route: to, arrived: arrived, timeout: f.timeout(), status: http.StatusInternalServerError}
}

func (x *exchange) serve(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	x.timer = time.AfterFunc(x.timeout, func() { cancel(errTooLate) })
	defer x.timer.Stop()
	x.function.metrics.inFlight.Inc()
	defer x.end()

	x.traced = r.Header.Get(TraceHeader) == "1"
	client := r.Context()
	r = r.WithContext(ctx)
	if r.ProtoMajor == 1 && r.ContentLength != 0 {
		// Without it net/http reads up what is left of the body before the answer begins.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	if err := x.admit(ctx, w, r); err != nil {
		x.refuse(client, w, err)
		return
	}
	hop := relay.Hop{
		Transport: x, Rewrite: x.rewrite, Modify: x.modify, Buffers: x.gateway.buffers, ErrorLog: x.gateway.errorLog,
		Refuse: func(w http.ResponseWriter, _ *http.Request, err error) { x.refuse(client, w, err) },
	}
	hop.ServeHTTP(w, r)
}

// end gives everything back, also when the proxy panics to abort an answer.
func (x *exchange) end() {
	now := time.Now()
	if x.lease.endpoint != nil {
		x.function.done(x.lease, now)
	}
	if x.held > 0 {
		x.gateway.bodies.Release(x.held)
	}
	x.function.metrics.inFlight.Dec()
	x.function.metrics.request(x.status, now.Sub(x.arrived))
}

// admit gets the request its slot.
func (x *exchange) admit(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	l, waiter, err := x.function.admit(x.arrived)
	if err != nil {
		return err
	}
	if waiter != nil {
		if err := x.hold(w, r); err != nil {
			x.function.leave(waiter)
			return err
		}
		if l, err = x.await(ctx, waiter); err != nil {
			return err
		}
	}
	x.lease, x.granted = l, time.Now()
	return nil
}

func (x *exchange) await(ctx context.Context, waiter *waiter) (lease, error) {
	l, err := x.function.await(ctx, waiter)
	x.function.metrics.queue.Observe(time.Since(waiter.since).Seconds())
	return l, err
}

// hold reads a small body while its request waits. Over HTTP/1 a client that leaves is noticed only once its request has
// been read to the end. A large or unbounded body stays where it is; its client is missed when its turn comes.
func (x *exchange) hold(w http.ResponseWriter, r *http.Request) error {
	n := r.ContentLength
	if r.ProtoMajor != 1 || n <= 0 || n > maxBodyBytes || !x.gateway.bodies.TryAcquire(n) {
		return nil
	}
	x.held = n
	connection := http.NewResponseController(w)
	if connection.SetReadDeadline(x.arrived.Add(x.timeout)) != nil {
		return nil
	}
	data := make([]byte, n)
	_, err := io.ReadFull(r.Body, data)
	_ = connection.SetReadDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &refusal{
			status: http.StatusRequestTimeout, code: "request_too_slow", reason: "the request's body did not arrive in time", next: "send it faster",
		}
	}
	if err != nil {
		return badRequest("the request's body broke off: " + err.Error())
	}
	r.Body = io.NopCloser(bytes.NewReader(data))
	r.Header.Del("Expect") // the body is here
	return nil
}

// RoundTrip sends the request to the Instance that it has a slot of. When nothing could be sent, or it may be sent again, it goes on
// to another one.
func (x *exchange) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		x.body = &requestBody{ReadCloser: r.Body}
	}
	for attempts := 0; ; {
		e := x.lease.endpoint
		out := *r
		target := *r.URL
		target.Host = e.address
		out.URL = &target
		if x.body != nil {
			out.Body = x.body
		}
		x.sent = time.Now()
		res, err := e.transport.RoundTrip(&out)
		if err == nil {
			return x.firstByte(res)
		}
		how := x.blame(r.Context(), err)
		more := r.Context().Err() == nil && x.again(idempotent(r), err)
		if how == none && !more {
			return nil, err
		}
		suspect := x.complain(how, err)
		if !more {
			return nil, x.giveUp(r.Context(), e, err)
		}
		x.gateway.metrics.retries.Inc()
		if !suspect { // each failure of a suspect puts it away for longer: they bound themselves
			attempts++
		}
		if attempts == maxAttempts {
			return nil, noInstance("unreachable", x.function.name, err.Error(), "try again; see `hearth ps "+x.function.name+"`", time.Second)
		}
		if err := x.readmit(r.Context(), e); err != nil {
			return nil, err
		}
	}
}

// giveUp is the error of a request that goes nowhere else.
func (x *exchange) giveUp(ctx context.Context, e *endpoint, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return broken(x.function.name, e.id, err)
}

// complain gives the slot back of an Instance that failed, and has it looked at.
func (x *exchange) complain(how failure, err error) (suspect bool) {
	l, g := x.lease, x.gateway
	x.lease = lease{}
	if how == none {
		x.function.done(l, time.Now())
		return false
	}
	putAway, suspect, condemned := x.function.failed(l, how, time.Now())
	g.metrics.failures.WithLabelValues(how.String()).Inc()
	if putAway {
		g.config.Logger.Warn("endpoint put away", "function", x.function.name, "instance", l.endpoint.id, "address", l.endpoint.address, "failure", how, "err", err)
	}
	if putAway || condemned {
		g.infirmary.put(patient{x.function, l.endpoint, how, condemned})
	}
	return suspect
}

// idempotent says whether a request may run twice, by its method's definition (RFC 9110, 9.2.2) or its client's word.
func idempotent(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return r.Header.Get("Idempotency-Key") != ""
}

func (x *exchange) readmit(ctx context.Context, avoid *endpoint) error {
	l, waiter, err := x.function.readmit(time.Now(), avoid)
	if err == nil && waiter != nil {
		l, err = x.await(ctx, waiter)
	}
	x.lease = l
	return err
}

func (x *exchange) firstByte(res *http.Response) (*http.Response, error) {
	x.answered = time.Now()
	if !x.timer.Stop() {
		_ = res.Body.Close()
		return nil, errTooLate
	}
	x.function.answered(x.lease.endpoint)
	return res, nil
}

// refuse answers for an exchange that came to no answer of an Instance. client is the request's own context.
func (x *exchange) refuse(client context.Context, w http.ResponseWriter, err error) {
	no := x.why(client, err)
	x.status = no.status
	x.gateway.config.Logger.Debug("request not served", "function", x.function.name, "status", no.status, "err", err)
	no.write(w)
}

func (x *exchange) why(client context.Context, err error) *refusal {
	name := x.function.name
	var no *refusal
	switch {
	case client.Err() != nil:
		return clientGone()
	case errors.As(err, &no):
		return no
	case errors.Is(err, errTooLate) && x.granted.IsZero():
		return tooLate(name, x.timeout, "no instance was free or could be started")
	case errors.Is(err, errTooLate):
		return tooLate(name, x.timeout, "its instance began no answer")
	case x.body != nil && x.body.failed.Load() != nil:
		return badRequest("the request's body broke off: " + (*x.body.failed.Load()).Error())
	case x.lease.endpoint == nil:
		return noInstance("pool_unavailable", name, err.Error(), "try again", time.Second)
	default:
		return broken(name, x.lease.endpoint.id, err)
	}
}

func asRefusal(err error) *refusal {
	var no *refusal
	if errors.As(err, &no) {
		return no
	}
	return &refusal{status: http.StatusInternalServerError, code: "internal", reason: err.Error(), next: "see the gateway's log"}
}
