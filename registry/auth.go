package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

const (
	tokenTimeout  = 30 * time.Second
	maxTokenBytes = 1 << 20
)

// authState holds the tokens for one repository at one host.
//
// containerd's authorizer lives for one pull: it remembers a failed token fetch
// for ever, even one whose caller went away, and a token without an expiry until
// it is told otherwise. Ours lives long, so each challenge starts a new
// generation, with an authorizer of its own. Requests that were challenged
// together share the next one: a token that expires in mid-blob is fetched once.
type authState struct {
	creds  *keychain
	ref    string // the repository
	host   docker.RegistryHost
	client *http.Client // for token servers: bounded in time and size

	mu  sync.Mutex // guards cur
	cur *generation
}

// generation is an authorizer and its turn: a token that whoever uses it holds.
// So one request fetches a token while the others wait, and can stop waiting;
// containerd's own sharing of a fetch can not, and has a data race on the expiry
// (2.4.2). It is nil and never waited for before the first challenge.
type generation struct {
	docker.Authorizer
	turn chan struct{}
}

func newAuthState(creds *keychain, ref string, host docker.RegistryHost) *authState {
	client := *host.Client
	client.Timeout = tokenTimeout
	client.Transport = boundedTransport{host.Client.Transport}
	return &authState{creds: creds, ref: ref, host: host, client: &client, cur: &generation{}}
}

// authorize adds what is known to req and returns the generation it is from.
func (a *authState) authorize(ctx context.Context, req *http.Request) (*generation, error) {
	for {
		gen := a.current()
		if gen.Authorizer == nil {
			return gen, nil
		}
		select {
		case <-gen.turn:
		case <-ctx.Done():
			return gen, context.Cause(ctx)
		}
		if a.current() != gen { // it failed while we waited
			gen.turn <- struct{}{}
			continue
		}
		err := gen.Authorize(ctx, req)
		if err != nil {
			a.replace(gen, &generation{}) // so that the next request starts afresh
			err = authError(err)
		}
		gen.turn <- struct{}{}
		return gen, err
	}
}

// challenge answers the 401 that a request of generation used has met with. If
// another request is answering it, authorize will wait for that.
func (a *authState) challenge(ctx context.Context, used *generation, resp *http.Response) error {
	next := &generation{turn: make(chan struct{}, 1)}
	next.Authorizer = docker.NewDockerAuthorizer(
		docker.WithAuthClient(a.client),
		docker.WithAuthHeader(a.host.Header),
		docker.WithAuthCreds(func(host string) (string, string, error) {
			cred, err := a.creds.lookup(ctx, a.ref, host)
			return cred.user, cred.secret, err
		}))
	if !a.replace(used, next) {
		return nil
	}
	err := next.AddResponses(ctx, []*http.Response{resp})
	if err != nil {
		a.replace(next, &generation{})
	}
	next.turn <- struct{}{}
	return err
}

func (a *authState) current() *generation {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cur
}

// replace puts next in the place of used, unless that was done already.
func (a *authState) replace(used, next *generation) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cur != used {
		return false
	}
	a.cur = next
	return true
}

// authError turns a token server's answer into ours, which quotes no query.
func authError(err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		u, perr := url.Parse(status.RequestURL)
		if perr != nil {
			u = nil
		}
		err = &StatusError{Code: status.StatusCode, URL: safeURL(u)}
		if status.StatusCode == http.StatusBadRequest { // what OAuth says for bad credentials
			err = fmt.Errorf("%w: %w", ErrUnauthorized, err)
		}
	} else {
		err = transportError(err)
	}
	return fmt.Errorf("get token: %w", err)
}

// boundedTransport cuts bodies that are larger than any token answer.
type boundedTransport struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (t boundedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = boundedBody{io.LimitReader(resp.Body, maxTokenBytes), resp.Body}
	return resp, nil
}

type boundedBody struct {
	io.Reader
	io.Closer
}
