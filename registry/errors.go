package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

var (
	// ErrNotFound is matched by a StatusError of 404: no host has it.
	ErrNotFound = errors.New("not found in registry")
	// ErrUnauthorized is matched when credentials are missing, wrong or not enough.
	ErrUnauthorized = errors.New("registry refused access")
	// ErrSize is matched when a registry promises or sends another number of
	// bytes than the descriptor says, or more than the limit for its kind.
	ErrSize = errors.New("wrong size")
	// ErrProtocol is matched when an answer contradicts the request or itself,
	// such as a Content-Range that was not asked for. It is never retried on the
	// same host.
	ErrProtocol = errors.New("registry broke the protocol")
	// ErrDigest is matched when a manifest or config is not what its digest says.
	ErrDigest = errors.New("digest mismatch")
	// ErrUnsupported is matched by images that this node cannot run.
	ErrUnsupported = errors.New("unsupported image")

	errStalled = errors.New("connection stalled")
)

// StatusError is an HTTP answer that was not a success.
type StatusError struct {
	Code       int
	URL        string        // without credentials and query
	RetryAfter time.Duration // what the registry asked for, 0 if nothing
	Detail     string        // the registry's own words, if it had any

	redirected bool // the answer came from where the registry sent us
}

// Error names the request, the status and the registry's reason.
func (e *StatusError) Error() string {
	msg := fmt.Sprintf("%s: status %d %s", e.URL, e.Code, http.StatusText(e.Code))
	if e.Detail != "" {
		msg += fmt.Sprintf(" (%q)", e.Detail)
	}
	return msg
}

// Is matches ErrNotFound and ErrUnauthorized.
func (e *StatusError) Is(target error) bool {
	switch target {
	case ErrNotFound:
		return e.Code == http.StatusNotFound
	case ErrUnauthorized:
		return e.Code == http.StatusUnauthorized || e.Code == http.StatusForbidden
	}
	return false
}

// statusError reads what an unsuccessful answer says. It does not close the body.
func statusError(resp *http.Response, now time.Time) *StatusError {
	e := &StatusError{
		Code:       resp.StatusCode,
		URL:        safeURL(resp.Request.URL),
		RetryAfter: parseRetryAfter(resp.Header.Get("Retry-After"), now),
		redirected: resp.Request.Response != nil,
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // for the reason only
	var answer struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal(body, &answer) == nil && len(answer.Errors) > 0 {
		detail := strings.TrimSpace(answer.Errors[0].Code + " " + answer.Errors[0].Message)
		e.Detail = detail[:min(len(detail), 200)]
	}
	return e
}

// parseRetryAfter reads seconds or an HTTP date; what it cannot read is 0.
func parseRetryAfter(v string, now time.Time) time.Duration {
	const most = 24 * time.Hour // also keeps the multiplication from overflowing
	if secs, err := strconv.Atoi(v); err == nil {
		return time.Duration(min(max(secs, 0), int(most/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return min(max(at.Sub(now), 0), most)
	}
	return 0
}

// safeURL is for logs and errors: signed URLs carry their secret in the query,
// some registries' in the user part.
func safeURL(u *url.URL) string {
	if u == nil {
		return ""
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// transportError rebuilds the error of http.Client.Do, which quotes the whole
// URL, possibly of a signed redirect.
func transportError(err error) error {
	var ue *url.Error
	if !errors.As(err, &ue) {
		return err
	}
	u, perr := url.Parse(ue.URL)
	if perr != nil {
		u = nil
	}
	return fmt.Errorf("%s %s: %w", ue.Op, safeURL(u), ue.Err)
}
