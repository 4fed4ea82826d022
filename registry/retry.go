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
	// maxAttempts without progress on the last host; a mirror gets fewer, as
	// there is somewhere else to go.
	maxAttempts       = 6
	maxMirrorAttempts = 2
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
// leave a bad mirror together.
func (r *repository) each(ctx context.Context, sites []site, from *atomic.Int32, op operation) error {
	if len(sites) == 0 {
		return fmt.Errorf("%s: hosts.toml leaves no host to ask: %w", r.spec.Locator, ErrNotFound)
	}
	var earlier error
	for {
		i := from.Load()
		last := int(i) == len(sites)-1
		err := r.retry(ctx, sites[i], last, op)
		if err == nil {
			return nil
		}
		if last || ctx.Err() != nil {
			if earlier != nil {
				err = fmt.Errorf("%w (before that: %s)", err, earlier.Error())
			}
			return err
		}
		r.client.log.Debug("registry host gave up, trying the next", "host", sites[i].Host, "error", err)
		earlier = err
		from.CompareAndSwap(i, i+1)
	}
}

// retry runs op at one site until it succeeds, fails for good or has failed too
// often without progress.
func (r *repository) retry(ctx context.Context, at site, last bool, op operation) error {
	limit := maxMirrorAttempts
	if last {
		limit = maxAttempts
	}
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
		if failed >= limit || !retryable(err, last) {
			return err
		}
		if werr := wait(ctx, delay(err, failed)); werr != nil {
			return fmt.Errorf("%w, no time left to retry: %w", err, werr)
		}
		r.client.metrics.retries.WithLabelValues(retryReason(err)).Inc()
	}
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
	case se.Code == http.StatusTooManyRequests:
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
	d := min(backoffBase<<min(failed-1, 16), backoffMax)
	d = d/2 + rand.N(d/2+1)
	var se *StatusError
	if errors.As(err, &se) && se.RetryAfter > 0 {
		return max(min(se.RetryAfter, maxRetryAfter), d)
	}
	return d
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
