package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"path"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// maxChallenges: the first 401 asks for a token, the second says that it was
// stale, the third may be for a token that was just thrown away; one more means
// that it will never do.
const maxChallenges = 3

// get asks one host for a manifest or blob, or where it has sent us for the same
// before. It answers challenges; any other answer but 2xx is a *StatusError. The
// caller closes the body, and holds a lease of the host's pacer.
func (r *repository) get(ctx context.Context, at site, kind, object string, header http.Header) (*http.Response, error) {
	if resp := r.again(ctx, at, object, header); resp != nil {
		return resp, nil
	}
	ctx, err := docker.ContextWithRepositoryScope(ctx, r.spec, false)
	if err != nil {
		return nil, err
	}
	for challenges := 0; ; challenges++ {
		req, err := r.request(ctx, at, kind, object, header)
		if err != nil {
			return nil, err
		}
		gen, err := at.auth.authorize(ctx, req)
		if err != nil {
			return nil, err
		}
		resp, err := r.do(at, req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode/100 == 2 {
			at.redirects.keep(object, at.Host, resp, time.Now())
			return resp, nil
		}
		status := statusError(resp, time.Now())
		resp.Body.Close()
		at.throttled(status)
		switch {
		case status.redirected, challenges == maxChallenges:
			return nil, status
		case status.Code == http.StatusForbidden && at.auth.outdated(ctx, gen):
		case status.Code != http.StatusUnauthorized:
			return nil, status
		default:
			if err := at.auth.challenge(ctx, gen, resp); err != nil {
				return nil, fmt.Errorf("%w: %w", status, err)
			}
		}
	}
}

// again asks where the host has sent us for object before. It is nil if that is not known or has not gone well: the registry may
// then send us elsewhere, or the same way with a fresh signature.
func (r *repository) again(ctx context.Context, at site, object string, header http.Header) *http.Response {
	to := at.redirects.get(object, time.Now())
	if to == nil {
		return nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, to.url.String(), nil)
	if err == nil {
		for _, h := range []http.Header{to.header, header} {
			maps.Copy(req.Header, h.Clone())
		}
		r.client.metrics.redirects.Inc()
		var resp *http.Response
		if resp, err = r.do(at, req); err == nil && resp.StatusCode/100 == 2 {
			return resp
		}
		if err == nil {
			resp.Body.Close()
		}
	}
	if ctx.Err() == nil {
		at.redirects.forget(object, to)
	}
	return nil
}

func (r *repository) request(ctx context.Context, at site, kind, object string, header http.Header) (*http.Request, error) {
	u := url.URL{Scheme: at.Scheme, Host: at.Host, Path: path.Join("/", at.Path, r.name, kind, object)}
	if name := r.spec.Hostname(); at.Host != name && (name != "docker.io" || at.Host != "registry-1.docker.io") {
		u.RawQuery = url.Values{"ns": {name}}.Encode() // tells a mirror whose image it is
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for _, h := range []http.Header{at.Header, header} {
		for k, v := range h {
			req.Header[k] = append([]string(nil), v...)
		}
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", "hearth")
	}
	return req, nil
}

// do sends req and accounts for it. The body counts as in flight until closed.
func (r *repository) do(at site, req *http.Request) (*http.Response, error) {
	c, start := r.client, time.Now()
	c.metrics.inFlight.Inc()
	resp, err := at.Client.Do(req)
	c.metrics.requests.WithLabelValues(outcome(resp, err)).Inc()
	if err != nil {
		c.metrics.inFlight.Dec()
		err = transportError(err)
		if cause := context.Cause(req.Context()); cause != nil && errors.Is(err, context.Canceled) {
			err = cause
		}
		c.log.Debug("registry request", "url", safeURL(req.URL), "range", req.Header.Get("Range"),
			"error", err, "took", time.Since(start))
		return nil, err
	}
	c.log.Debug("registry request", "url", safeURL(req.URL), "range", req.Header.Get("Range"),
		"status", resp.StatusCode, "took", time.Since(start))
	if resp.StatusCode < http.StatusInternalServerError {
		at.alive()
	}
	resp.Body = &countedBody{ReadCloser: resp.Body, metrics: c.metrics, pacer: at.pacer}
	return resp, nil
}

// countedBody feeds the metrics and the pacer. Read and Close are called by one
// goroutine.
type countedBody struct {
	io.ReadCloser
	metrics *metrics
	pacer   *pacer
	closed  bool
}

// Read implements io.Reader.
func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.metrics.came.Add(int64(n))
	b.pacer.bytes.Add(int64(n))
	return n, err
}

// Close implements io.Closer; a second call does nothing.
func (b *countedBody) Close() error {
	if b.closed {
		return nil
	}
	b.closed = true
	b.metrics.inFlight.Dec()
	return b.ReadCloser.Close()
}
