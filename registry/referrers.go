package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxReferrerPages bounds the pages on which referrers of a type are looked for.
	maxReferrerPages = 32
	// maxLinkBytes is longer than any address of a page that a registry hands out.
	maxLinkBytes = 4096
	// clockSkew is how far in the future something may say that it was made.
	clockSkew = time.Hour
	// attachSettle is longer than a client takes from reading a list of referrers to writing it, as a rule.
	attachSettle   = 500 * time.Millisecond
	attachAttempts = 6
	// emptyConfig is the config of an artifact that has none.
	emptyConfig = "{}"
)

// artifacts are the referrers of one type that are of use: those that say of themselves that they are the newest.
type artifacts struct {
	kind   string // the artifactType
	listed int    // so many are looked at in the list
	read   int    // of which so many are read
	bytes  int64  // a manifest has no more
}

// documents reads the manifests of what refers to a subject, the newest first. The error is of those that are not what the list says,
// or were deleted; what could be read is returned with it.
func (r *repository) documents(ctx context.Context, subject digest.Digest, of artifacts) (read [][]byte, err error) {
	if err := subject.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", subject, err)
	}
	list, err := r.referrers(ctx, subject, of)
	if err != nil {
		return nil, err
	}
	newestFirst(list, time.Now())
	var faults []error
	for _, d := range list[:min(len(list), of.read)] {
		if d.Size > of.bytes {
			faults = append(faults, fmt.Errorf("%s has %d bytes, more than %d: %w", d.Digest, d.Size, of.bytes, ErrSize))
			continue
		}
		data, _, err := r.document(ctx, "", d)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		read = append(read, data)
	}
	return read, errors.Join(faults...)
}

// newestFirst sorts by what the descriptors say of themselves. What does not say when it was made, or says that it will be, comes last,
// in the order of the list.
func newestFirst(list []ocispec.Descriptor, now time.Time) {
	made := func(d ocispec.Descriptor) time.Time {
		t, err := time.Parse(time.RFC3339, d.Annotations[ocispec.AnnotationCreated])
		if err != nil || t.After(now.Add(clockSkew)) {
			return time.Time{}
		}
		return t
	}
	slices.SortStableFunc(list, func(a, b ocispec.Descriptor) int { return made(b).Compare(made(a)) })
}

// referrers lists what refers to a manifest and is of the artifact type, as the registry says: by the referrers API, or where
// there is none by the tag that stands in for it (OCI distribution specification 1.1). None is no error.
func (r *repository) referrers(ctx context.Context, subject digest.Digest, of artifacts) ([]ocispec.Descriptor, error) {
	all, err := r.referrersAPI(ctx, subject, of)
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
	return of.among(all), nil
}

// among leaves those of the type, at most as many as are looked at.
func (of artifacts) among(all []ocispec.Descriptor) []ocispec.Descriptor {
	all = slices.DeleteFunc(all, func(d ocispec.Descriptor) bool { return d.ArtifactType != of.kind })
	return all[:min(len(all), of.listed)]
}

// referrersAPI reads page after page, until there are enough. A registry that filters has what anyone would attach on the first; one
// that does not may have it behind signatures and lists of parts by the hundred.
func (r *repository) referrersAPI(ctx context.Context, subject digest.Digest, of artifacts) (found []ocispec.Descriptor, err error) {
	var from atomic.Int32 // pages are of one host: its own alone knows what comes next
	query := url.Values{"artifactType": {of.kind}}
	for range maxReferrerPages {
		data, next, err := r.referrersPage(ctx, subject, query, &from)
		if err != nil {
			return nil, err
		}
		page, err := parseReferrers(data)
		if err != nil {
			return nil, err
		}
		found = of.among(append(found, page...))
		if next == nil || len(found) == of.listed {
			break
		}
		next.Set("artifactType", of.kind)
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

// artifact is the manifest of an artifact whose subject is an image. Its config is emptyConfig, which has to be pushed before.
func artifact(img *Image, kind string, annotations map[string]string) ocispec.Manifest {
	return ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind,
		// Registries before OCI 1.1 take the artifact's type from the config's.
		Config:      ocispec.Descriptor{MediaType: kind, Digest: digest.FromString(emptyConfig), Size: int64(len(emptyConfig))},
		Subject:     &ocispec.Descriptor{MediaType: img.MediaType, Digest: img.Digest, Size: img.Size},
		Annotations: annotations,
	}
}

// attach stores an artifact, so that referrers finds it. Its layers are in the repository already.
func (c *Client) attach(ctx context.Context, img *Image, m ocispec.Manifest, of artifacts) error {
	if _, err := c.PutBlob(ctx, img.Ref, m.Config, strings.NewReader(emptyConfig)); err != nil {
		return err
	}
	r, _, err := c.repository(ctx, img.Ref)
	if err != nil {
		return err
	}
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	dgst := digest.FromBytes(data)
	linked, err := r.putManifest(ctx, dgst.String(), m.MediaType, data)
	if err != nil || linked {
		return err
	}
	all, err := r.referrersAPI(ctx, m.Subject.Digest, of)
	if err == nil && slices.ContainsFunc(all, func(d ocispec.Descriptor) bool { return d.Digest == dgst }) {
		return nil // it does, without having said so
	}
	tag := referrersTag(m.Subject.Digest)
	if err := r.attachByTag(ctx, tag, of, ocispec.Descriptor{
		MediaType: m.MediaType, ArtifactType: m.ArtifactType, Digest: dgst, Size: int64(len(data)), Annotations: m.Annotations,
	}); err != nil {
		return fmt.Errorf("referrers tag %s: %w", tag, err)
	}
	return nil
}

// attachByTag adds a manifest to the list that the subject's tag names. Registries know no compare-and-swap of a tag: of two clients who
// read the list and write it at once, the later one loses what the former has added. So who has written looks again, after longer than
// another takes from reading to writing, and writes again what is not there.
func (r *repository) attachByTag(ctx context.Context, tag string, of artifacts, desc ocispec.Descriptor) error {
	for range attachAttempts {
		wrote, err := r.listByTag(ctx, tag, of, desc)
		if err != nil || !wrote {
			return err
		}
		pause := time.NewTimer(attachSettle + rand.N(attachSettle))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return context.Cause(ctx)
		}
	}
	return fmt.Errorf("others write it all the time, %s was not kept in %d attempts; try again", desc.Digest, attachAttempts)
}

// listByTag adds a manifest to a list, unless it is there.
func (r *repository) listByTag(ctx context.Context, tag string, of artifacts, desc ocispec.Descriptor) (wrote bool, err error) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	data, _, err := r.document(ctx, tag, ocispec.Descriptor{})
	if err == nil {
		index.Manifests, err = parseReferrers(data)
	} else if errors.Is(err, ErrNotFound) {
		err = nil
	}
	if err != nil {
		return false, err
	}
	if slices.ContainsFunc(index.Manifests, func(d ocispec.Descriptor) bool { return d.Digest == desc.Digest }) {
		return false, nil
	}
	index.Manifests = of.add(index.Manifests, desc)
	if data, err = json.Marshal(index); err != nil {
		return false, err
	}
	_, err = r.putManifest(ctx, tag, index.MediaType, data)
	return true, err
}

// add appends a manifest to a list, in which it leaves no more of its type than are looked at: the oldest go.
func (of artifacts) add(list []ocispec.Descriptor, desc ocispec.Descriptor) []ocispec.Descriptor {
	var same []ocispec.Descriptor
	for _, d := range list {
		if d.ArtifactType == of.kind {
			same = append(same, d)
		}
	}
	newestFirst(same, time.Now())
	for _, old := range same[min(len(same), of.listed-1):] {
		list = slices.DeleteFunc(list, func(d ocispec.Descriptor) bool { return d.Digest == old.Digest })
	}
	return append(list, desc)
}
