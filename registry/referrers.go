package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxReferrers bounds the referrers of one type that are looked at, and maxReferrerPages the pages on which they are looked for.
	maxReferrers     = 16
	maxReferrerPages = 32
	// maxLinkBytes is longer than any address of a page that a registry hands out.
	maxLinkBytes = 4096
)

// referrers lists what refers to a manifest and is of the artifact type, as the registry says: by the referrers API, or where
// there is none by the tag that stands in for it (OCI distribution specification 1.1). None is no error.
func (r *repository) referrers(ctx context.Context, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	all, err := r.referrersAPI(ctx, subject, artifactType)
	if !hasNoReferrersAPI(err) {
		return all, err
	}
	data, _, err := r.document(ctx, referrersTag(subject), ocispec.Descriptor{})
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if all, err = parseReferrers(data); err != nil {
		return nil, err
	}
	return ofType(all, artifactType), nil
}

// ofType leaves at most maxReferrers of one type.
func ofType(all []ocispec.Descriptor, artifactType string) []ocispec.Descriptor {
	all = slices.DeleteFunc(all, func(d ocispec.Descriptor) bool { return d.ArtifactType != artifactType })
	return all[:min(len(all), maxReferrers)]
}

// referrersAPI reads page after page, until there are enough. A registry that filters has what anyone would attach on the first; one
// that does not may have it behind signatures and lists of parts by the hundred.
func (r *repository) referrersAPI(ctx context.Context, subject digest.Digest, artifactType string) (found []ocispec.Descriptor, err error) {
	var from atomic.Int32 // pages are of one host: its own alone knows what comes next
	query := url.Values{"artifactType": {artifactType}}
	for range maxReferrerPages {
		data, next, err := r.referrersPage(ctx, subject, query, &from)
		if err != nil {
			return nil, err
		}
		page, err := parseReferrers(data)
		if err != nil {
			return nil, err
		}
		found = ofType(append(found, page...), artifactType)
		if next == nil || len(found) == maxReferrers {
			break
		}
		next.Set("artifactType", artifactType)
		query = next
	}
	return found, nil
}

// referrersPage reads a page, and the query that asks for the next one; nil after the last.
func (r *repository) referrersPage(ctx context.Context, subject digest.Digest, query url.Values, from *atomic.Int32) (data []byte, next url.Values, err error) {
	err = r.each(ctx, r.with(docker.HostCapabilityPull), from, func(ctx context.Context, at site) (int64, error) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		resp, err := r.exchange(ctx, at, call{
			method: http.MethodGet, kind: "referrers", object: subject.String(),
			query: query, header: http.Header{"Accept": {ocispec.MediaTypeImageIndex}},
		})
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		next = nextPage(resp.Header.Values("Link"))
		body := watch(ctx, cancel, resp.Body, r.client.cfg.StallTimeout)
		resp.Header.Del("Docker-Content-Digest") // the answer is made up on the spot
		data, err = readSmall(resp, body, ocispec.Descriptor{}, maxManifestBytes)
		return 0, err
	})
	return data, next, err
}

// nextPage is the query of the link to the next page (RFC 8288), or nil. Where else the link leads is not followed: the rest of the
// address is that of the page before, so that no credentials go astray, and no proxy's idea of its own name is in the way.
func nextPage(headers []string) url.Values {
	for _, h := range headers {
		for len(h) <= maxLinkBytes {
			_, after, found := strings.Cut(h, "<")
			target, rest, closed := strings.Cut(after, ">")
			if !found || !closed {
				break
			}
			params := rest
			if i := strings.IndexByte(rest, '<'); i >= 0 {
				params = rest[:i]
			}
			h = rest
			if !isNext(params) {
				continue
			}
			if u, err := url.Parse(target); err == nil && u.RawQuery != "" {
				return u.Query()
			}
		}
	}
	return nil
}

// isNext says whether a link's parameters have the relation next.
func isNext(params string) bool {
	for param := range strings.FieldsFuncSeq(params, func(r rune) bool { return r == ';' || r == ',' }) {
		key, value, _ := strings.Cut(strings.TrimSpace(param), "=")
		if strings.EqualFold(strings.TrimSpace(key), "rel") {
			return slices.ContainsFunc(strings.Fields(strings.Trim(strings.TrimSpace(value), `"`)), func(rel string) bool { return strings.EqualFold(rel, "next") })
		}
	}
	return false
}

// hasNoReferrersAPI says whether an error is how a registry answers that does not know the request. Some do so in ways of their
// own.
func hasNoReferrersAPI(err error) bool {
	var se *StatusError
	if !errors.As(err, &se) {
		return false
	}
	return slices.Contains([]int{http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable,
		http.StatusUnsupportedMediaType, http.StatusNotImplemented}, se.Code)
}

// referrersTag is the tag under which clients keep a list of referrers.
func referrersTag(subject digest.Digest) string {
	tag := subject.Algorithm().String() + "-" + subject.Encoded()
	return tag[:min(len(tag), 128)]
}

// parseReferrers reads a list of referrers, of whatever types.
func parseReferrers(data []byte) ([]ocispec.Descriptor, error) {
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("referrers: %w: %w", ErrProtocol, err)
	}
	if index.MediaType != "" && index.MediaType != ocispec.MediaTypeImageIndex {
		return nil, fmt.Errorf("referrers are of type %.80q: %w", index.MediaType, ErrProtocol)
	}
	if err := validateAll(index.Manifests...); err != nil {
		return nil, fmt.Errorf("referrers: %w", err)
	}
	return index.Manifests, nil
}

// attach stores a manifest that has a subject, so that referrers finds it.
func (r *repository) attach(ctx context.Context, m ocispec.Manifest) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	dgst := digest.FromBytes(data)
	linked, err := r.putManifest(ctx, dgst.String(), m.MediaType, data)
	if err != nil || linked {
		return err
	}
	all, err := r.referrersAPI(ctx, m.Subject.Digest, m.ArtifactType)
	if err == nil && slices.ContainsFunc(all, func(d ocispec.Descriptor) bool { return d.Digest == dgst }) {
		return nil // it does, without having said so
	}
	return r.attachByTag(ctx, m, ocispec.Descriptor{
		MediaType: m.MediaType, ArtifactType: m.ArtifactType, Digest: dgst, Size: int64(len(data)), Annotations: m.Annotations,
	})
}

// attachByTag adds a manifest to the list that the subject's tag names. Two clients who do so at once can lose one of the two:
// the specification knows no remedy, and the one that is lost can be attached again.
func (r *repository) attachByTag(ctx context.Context, m ocispec.Manifest, desc ocispec.Descriptor) error {
	tag := referrersTag(m.Subject.Digest)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	data, _, err := r.document(ctx, tag, ocispec.Descriptor{})
	if err == nil {
		index.Manifests, err = parseReferrers(data)
	} else if errors.Is(err, ErrNotFound) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("referrers tag %s: %w", tag, err)
	}
	index.Manifests = slices.DeleteFunc(index.Manifests, func(d ocispec.Descriptor) bool { return d.Digest == desc.Digest })
	index.Manifests = append(index.Manifests, desc)
	if data, err = json.Marshal(index); err != nil {
		return err
	}
	if _, err := r.putManifest(ctx, tag, index.MediaType, data); err != nil {
		return fmt.Errorf("referrers tag %s: %w", tag, err)
	}
	return nil
}
