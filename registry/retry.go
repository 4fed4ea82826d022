package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"time"
)

const (
	// maxAttempts without progress on the last host, which is ten seconds or more
	// of an outage; a mirror gets fewer, as there is somewhere else to go, and so
	// does a host that does not even refuse connections.
	maxAttempts       = 8
	maxMirrorAttempts = 2
	slowDial          = 3 * time.Second
	// maxBusy is how often a busy host may say so: it is asked when it said that
	// it could be, and each of many ranges may meet with it anew.
	maxBusy = 20
	// minProgress is what an attempt must bring to count as none of them: an
	// unsteady link may break any number of times, a trickle may not.
	minProgress = 64 << 10

	backoffBase   = 100 * time.Millisecond
	backoffMax    = 5 * time.Second
	maxRetryAfter = 30 * time.Second
)

// operation is one attempt at one host. It returns the bytes it brought, which
// the next attempt need not fetch again.
type operation func(ctx context.Context, at site) (progress int64, err error)

// each runs op on the sites, in order, until one succeeds. from is where to
// begin and is moved on with each site that fails, so that the spans of a blob
// leave a bad mirror together. A site that was bad shortly before is left out at
// first, and asked after all if the last fails too.
func (r *repository) each(ctx context.Context, sites []site, from *atomic.Int32, op operation) error {
	if len(sites) == 0 {
		return fmt.Errorf("%s: hosts.toml leaves no host to ask: %w", r.spec.Locator, ErrNotFound)
	}
	asked := make([]bool, len(sites))
	var earlier error
	for {
		i := from.Load()
		if !sites[i].last && sites[i].skip() {
			r.client.metrics.skipped.Inc()
			from.CompareAndSwap(i, i+1)
			continue
		}
		asked[i] = true
		err := r.retry(ctx, sites[i], op)
		if err == nil {
			return nil
		}
		if sites[i].last || ctx.Err() != nil {
			return r.leftOut(ctx, sites, asked, from, op, after(err, earlier))
		}
		r.client.log.Debug("registry host gave up, trying the next", "host", sites[i].Host, "error", err)
		earlier = err
		from.CompareAndSwap(i, i+1)
	}
}

// leftOut runs op on the sites that were not asked, because the last has failed
// with err and they may have recovered. If one has, all begin there.
func (r *repository) leftOut(ctx context.Context, sites []site, asked []bool, from *atomic.Int32, op operation, err error) error {
	for i := range sites {
		if asked[i] || ctx.Err() != nil || !unreachable(err) {
			continue
		}
		if again := r.retry(ctx, sites[i], op); again == nil {
			from.Store(int32(i))
			return nil
		}
	}
	return err
}

func after(err, earlier error) error {
	if earlier == nil {
		return err
	}
	return fmt.Errorf("%w (before that: %s)", err, earlier.Error())
}

// retry runs op at one site until it succeeds, fails for good or has failed too
// often without progress.
func (r *repository) retry(ctx context.Context, at site, op operation) error {
	busy := 0
	for failed := 1; ; failed++ {
		progress, err := op(ctx, at)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if progress >= minProgress {
			failed = 1
		}
		over := failed >= attempts(err, at.last)
		if throttles(err) {
			busy, over = busy+1, busy+1 >= maxBusy
			failed-- // not a failure
		}
		if over || !retryable(err, at.last) {
			if unreachable(err) {
				at.failed()
			}
			return err
		}
		if werr := wait(ctx, delay(err, failed+busy)); werr != nil {
			return fmt.Errorf("%w, no time left to retry: %w", err, werr)
		}
		r.client.metrics.retries.WithLabelValues(retryReason(err)).Inc()
	}
}

// attempts is how often a host may fail in a row with an error such as err.
func attempts(err error, last bool) int {
	var dial *dialError
	switch dialed := errors.As(err, &dial); {
	case dialed && !last:
		return 1
	case dialed && dial.took > slowDial, !last:
		return maxMirrorAttempts
	}
	return maxAttempts
}

// throttles says whether err is an answer that asks for fewer requests.
func throttles(err error) bool {
	var se *StatusError
	return errors.As(err, &se) && (se.Code == http.StatusTooManyRequests || se.Code == http.StatusServiceUnavailable && se.RetryAfter > 0)
}

// retryable says whether the same host may answer better the next time.
func retryable(err error, last bool) bool {
	var se *StatusError
	var cert *tls.CertificateVerificationError
	switch {
	case errors.Is(err, ErrSize), errors.Is(err, ErrProtocol), errors.Is(err, ErrDigest), errors.As(err, &cert):
		return false
	case !errors.As(err, &se):
		return !errors.Is(err, ErrUnauthorized) // the connection broke
	case throttles(err):
		return last // a mirror that is busy is a reason to ask the next
	case se.Code == http.StatusRequestTimeout, se.Code >= 500:
		return true
	case se.redirected: // a signed URL that expired; the registry signs a new one
		return se.Code == http.StatusBadRequest || se.Code == http.StatusUnauthorized || se.Code == http.StatusForbidden
	}
	return false
}

// delay is what the registry asked for, up to a bound, or else exponential with
// jitter, so that ranges which failed together do not come back together.
func delay(err error, failed int) time.Duration {
	d := backoff(failed)
	var se *StatusError
	if errors.As(err, &se) && se.RetryAfter > 0 {
		return max(min(se.RetryAfter, maxRetryAfter), d)
	}
	return d
}

// backoff is the pause after so many failures in a row.
func backoff(failed int) time.Duration {
	d := min(backoffBase<<min(max(failed, 1)-1, 16), backoffMax)
	return d/2 + rand.N(d/2+1)
}

// wait sleeps, unless ctx would end first: then it says so at once.
func wait(ctx context.Context, d time.Duration) error {
	if end, ok := ctx.Deadline(); ok && time.Until(end) < d {
		return context.DeadlineExceeded
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
