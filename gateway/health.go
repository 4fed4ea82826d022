package gateway

import (
	"context"
	"errors"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/relay"
)

const (
	// strikesAllowed in a row, with no answer between them: one time-out or one broken connection says little, and must not put
	// away the only endpoint there is.
	strikesAllowed = 3
	// A refusal is believed once this many further attempts to connect, so far apart, have failed as well.
	probes     = 3
	probePause = 100 * time.Millisecond
	// releaseTime bounds a call of Release, and releaseInterval is between those of one Function for what its own requests may be the
	// cause of. When what all its Instances depend on is down, replacing them all would make it worse.
	releaseTime     = 5 * time.Second
	releaseInterval = 10 * time.Second
)

// failure is how an Instance failed a request, as far as that is the Instance's doing.
type failure int

const (
	// none: the client left, or sent too slowly, or the connection was an old one that the Instance may close when it likes.
	none failure = iota
	// refused: nobody listens there.
	refused
	// reset: it took the connection and broke it off before a byte of an answer.
	reset
	// late: it could not be connected to in time, or began no answer in time.
	late
)

func (f failure) String() string { return [...]string{"none", "refused", "reset", "late"}[f] }

// blame says how an Instance failed a round trip that ended with err.
func (x *exchange) blame(ctx context.Context, err error) failure {
	var dial *dialError
	isDial := errors.As(err, &dial)
	at, _ := errors.AsType[*relay.Failure](err)
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errTooLate) && x.body.endedBy(x.arrived.Add(x.timeout)):
		return late
	case cause != nil || x.body != nil && x.body.failed.Load() != nil:
		return none
	case isDial && dial.timeout():
		return late
	case isDial:
		return refused
	case at != nil && at.Reused:
		return none
	default:
		return reset
	}
}

// again says whether a request that failed may be sent to another Instance: nothing of it has been sent, or it may run twice.
func (x *exchange) again(idempotent bool, err error) bool {
	var dial *dialError
	if errors.As(err, &dial) {
		return true
	}
	if x.body != nil && x.body.begun.Load() {
		return false
	}
	// Once: a request that breaks whoever gets it must not be given to all.
	if x.broke = x.broke + 1; x.broke > 1 {
		return false
	}
	at, begun := errors.AsType[*relay.Failure](err)
	return idempotent || !begun || !at.Written
}

// failed notes a failure, and says whether the endpoint is out of rotation because of it. Guarded by the function's mutex.
func (e *endpoint) failed(now time.Time, how failure, alone bool) (putAway bool) {
	if how != refused {
		e.strikes++
		switch {
		case e.strikes >= strikesAllowed:
		case how == reset && alone:
			e.downs = max(e.downs, 1) // the last to be chosen, and not the reason for a start
			return false
		case how == reset:
		default:
			return false
		}
	}
	e.downUntil = now.Add(min(minDownTime<<min(e.downs, 10), maxDownTime))
	e.downs++
	return true
}

// patient is an endpoint that failed, with how; condemned is one that is not asked any more.
type patient struct {
	function  *function
	endpoint  *endpoint
	how       failure
	condemned bool
}

// examine finds out whether an Instance that failed is there at all, and has it replaced if it is not.
func (g *Gateway) examine(ctx context.Context, p patient) {
	if !p.condemned && g.connects(ctx, p.endpoint) {
		p.function.recovered(p.endpoint)
		return
	}
	if ctx.Err() != nil || !p.function.mayRelease(p, time.Now()) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	err := g.config.Pool.Release(ctx, &hearthv1.ReleaseRequest{InstanceId: p.endpoint.id})
	if err != nil {
		g.config.Logger.Warn("unhealthy instance not released", "function", p.function.name, "instance", p.endpoint.id, "failure", p.how, "err", err)
		return
	}
	g.metrics.releases.WithLabelValues(p.how.String()).Inc()
	g.config.Logger.Warn("unhealthy instance released", "function", p.function.name, "instance", p.endpoint.id, "failure", p.how)
	p.function.released(p.endpoint, time.Now())
}

// connects says whether an Instance accepts connections.
func (g *Gateway) connects(ctx context.Context, e *endpoint) bool {
	dial := e.dialer(&g.config)
	for n := range probes {
		if n > 0 && !sleep(ctx, probePause) {
			return false
		}
		if conn, err := dial(ctx); err == nil {
			_ = conn.Close()
			return true
		}
	}
	return false
}

// recovered puts an endpoint back that was out for nothing: it accepts connections. Its strikes stay until it answers.
func (f *function) recovered(e *endpoint) {
	f.mu.Lock()
	defer f.unlock()
	e.downUntil = time.Time{}
	f.pump(time.Now())
	if f.waiting.Len() > 0 {
		f.wake(f)
	}
}

// mayRelease says whether an endpoint's Instance may be given back now.
func (f *function) mayRelease(p patient, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.deleted || p.endpoint.draining || p.how != refused && now.Before(f.releaseAt) {
		return false
	}
	f.releaseAt = now.Add(releaseInterval)
	return true
}

// released takes an endpoint out for good.
func (f *function) released(e *endpoint, now time.Time) {
	f.mu.Lock()
	defer f.unlock()
	e.draining = true
	f.gone.add(e.key())
	f.sweep(now)
	f.roomMade()
	if f.waiting.Len() > 0 {
		f.wake(f)
	}
}
