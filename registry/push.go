package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// call is a request beyond reading a document by its name.
type call struct {
	method, kind, object string
	query                url.Values
	header               http.Header
	push                 bool        // wants the right to write
	body                 io.ReaderAt // nil: none
	size                 int64       // of body
	to                   *url.URL    // if set: where a registry has sent us, in place of kind and object
}

// exchange sends a call to one host and answers challenges; any other answer but 2xx is a *StatusError. The caller closes the
// body. Credentials go to the host itself only, wherever it sends us.
func (r *repository) exchange(ctx context.Context, at site, c call) (*http.Response, error) {
	ctx, err := docker.ContextWithRepositoryScope(ctx, r.spec, c.push)
	if err != nil {
		return nil, err
	}
	for challenges := 0; ; challenges++ {
		req, err := r.compose(ctx, at, c)
		if err != nil {
			return nil, err
		}
		gen, err := at.sign(ctx, req)
		if err != nil {
			return nil, err
		}
		resp, err := r.do(at, req)
		if err != nil || resp.StatusCode/100 == 2 {
			return resp, err
		}
		status := statusError(resp, time.Now())
		resp.Body.Close()
		if status.Code != http.StatusUnauthorized || status.redirected || gen == nil || challenges == maxChallenges {
			return nil, status
		}
		if err := at.auth.challenge(ctx, gen, resp); err != nil {
			return nil, fmt.Errorf("%w: %w", status, err)
		}
	}
}

// sign adds what is known to a request, if it goes to the host itself; otherwise there is no generation.
func (at site) sign(ctx context.Context, req *http.Request) (*generation, error) {
	if req.URL.Host != at.Host || req.URL.Scheme != at.Scheme {
		return nil, nil
	}
	return at.auth.authorize(ctx, req)
}

func (r *repository) compose(ctx context.Context, at site, c call) (*http.Request, error) {
	req, err := r.request(ctx, at, c.kind, c.object, c.header)
	if err != nil {
		return nil, err
	}
	req.Method = c.method
	if c.kind == "blobs" && c.object == "uploads" {
		req.URL.Path += "/" // the specification has it
	}
	if c.to != nil {
		if c.to.Host != at.Host || c.to.Scheme != at.Scheme {
			req.Header = c.header.Clone() // hosts.toml's headers are for the host
		}
		req.URL, req.Host = c.to, ""
	}
	query := req.URL.Query()
	for k, v := range c.query {
		query[k] = v
	}
	u := *req.URL
	u.RawQuery = query.Encode()
	req.URL = &u
	if c.body != nil {
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(c.body, 0, c.size)), nil }
		req.Body, _ = req.GetBody()
		req.ContentLength = c.size
	}
	return req, nil
}

// PutBlob stores a blob in ref's repository, unless it is there already, and says whether it was. content is read from its
// start, more than once if the registry fails in between; desc's digest and size must be content's. It writes to the hosts that
// hosts.toml lets it push to.
func (c *Client) PutBlob(ctx context.Context, ref string, desc ocispec.Descriptor, content io.ReaderAt) (existed bool, err error) {
	repo, _, err := c.repository(ctx, ref)
	if err == nil {
		var from atomic.Int32
		err = repo.each(ctx, repo.with(docker.HostCapabilityPush), &from, func(ctx context.Context, at site) (int64, error) {
			existed, err = repo.putBlob(ctx, at, desc, content)
			return 0, err
		})
	}
	if err != nil {
		return false, fmt.Errorf("push blob %s to %s: %w", desc.Digest, ref, err)
	}
	return existed, nil
}

func (r *repository) putBlob(ctx context.Context, at site, desc ocispec.Descriptor, content io.ReaderAt) (existed bool, err error) {
	resp, err := r.exchange(ctx, at, call{method: http.MethodHead, kind: "blobs", object: desc.Digest.String(), push: true})
	if err == nil {
		resp.Body.Close()
		if resp.ContentLength >= 0 && resp.ContentLength != desc.Size {
			return false, fmt.Errorf("registry has it with %d bytes, not %d: %w", resp.ContentLength, desc.Size, ErrSize)
		}
		return true, nil
	}
	if !errors.Is(err, ErrNotFound) {
		return false, err
	}
	resp, err = r.exchange(ctx, at, call{method: http.MethodPost, kind: "blobs", object: "uploads", push: true})
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	to, err := resp.Location()
	if err != nil || resp.StatusCode != http.StatusAccepted || to.Scheme != "https" && to.Scheme != at.Scheme {
		return false, fmt.Errorf("no place to upload to (status %d): %w", resp.StatusCode, ErrProtocol)
	}
	resp, err = r.exchange(ctx, at, call{
		method: http.MethodPut, to: to, push: true, body: content, size: desc.Size,
		query: url.Values{"digest": {desc.Digest.String()}}, header: http.Header{"Content-Type": {"application/octet-stream"}},
	})
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	return false, nil
}

// PutManifest stores a manifest under ref's tag. What it names has to be in the repository already.
func (c *Client) PutManifest(ctx context.Context, ref, mediaType string, data []byte) error {
	repo, spec, err := c.repository(ctx, ref)
	if err == nil {
		_, err = repo.putManifest(ctx, spec.Object, mediaType, data)
	}
	if err != nil {
		return fmt.Errorf("push manifest %s: %w", ref, err)
	}
	return nil
}

// putManifest stores a manifest under a tag or its digest. linked says that the registry lists it with its subject's referrers.
func (r *repository) putManifest(ctx context.Context, object, mediaType string, data []byte) (linked bool, err error) {
	var from atomic.Int32
	err = r.each(ctx, r.with(docker.HostCapabilityPush), &from, func(ctx context.Context, at site) (int64, error) {
		resp, err := r.exchange(ctx, at, call{
			method: http.MethodPut, kind: "manifests", object: object, push: true,
			body: bytes.NewReader(data), size: int64(len(data)), header: http.Header{"Content-Type": {mediaType}},
		})
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		linked = resp.Header.Get("OCI-Subject") != ""
		if got := resp.Header.Get("Docker-Content-Digest"); got != "" && got != digest.FromBytes(data).String() {
			return 0, fmt.Errorf("stored as %.80q: %w", got, ErrDigest)
		}
		return 0, nil
	})
	return linked, err
}
