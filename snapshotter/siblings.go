package snapshotter

import (
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

const (
	// siblingTimeout bounds a search for siblings.
	siblingTimeout = 5 * time.Second
	// siblingPatience is how long a layer waits for such a search, while the original is on its way already.
	siblingPatience = 250 * time.Millisecond
	// An image that has siblings keeps them; one that has none may get some, and one of which it is not known is asked again.
	foundHold   = 10 * time.Minute
	nothingHold = time.Minute
	// maxSearches bounds the images whose siblings are remembered, and the siblings that are known not to be usable.
	maxSearches = 256
)

// siblings finds layers in other encodings that were attached to an image, and chooses among them. They are never more than an
// offer: whatever is wrong with one, the original layer is taken instead.
type siblings struct {
	cfg     Config
	metrics *metrics
	measure *measure
	wg      sync.WaitGroup // the searches

	mu       sync.Mutex // guards what follows
	closed   bool
	searches map[searchKey]*search
	unusable map[digest.Digest]struct{} // blobs that went wrong
}

type searchKey struct {
	ref      string
	manifest digest.Digest
}

// search is a search for an image's siblings.
type search struct {
	cancel context.CancelFunc
	done   chan struct{}
	// Set before done is closed.
	found []registry.Sibling
	until time.Time // when it is too old to go by
}

func newSiblings(cfg Config, m *metrics) *siblings {
	return &siblings{
		cfg: cfg, metrics: m, measure: newMeasure(runtime.GOMAXPROCS(0)),
		searches: map[searchKey]*search{}, unusable: map[digest.Digest]struct{}{},
	}
}

// close ends the searches and waits for them. Those that come later find nothing.
func (s *siblings) close() {
	s.mu.Lock()
	s.closed = true
	for _, se := range s.searches {
		se.cancel()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// search begins to look for an image's siblings, or joins a search that is under way or not long ago. It does not wait. ctx
// lends the search its values, not its end: others join it.
func (s *siblings) search(ctx context.Context, ref string, manifest digest.Digest) *search {
	key := searchKey{ref, manifest}
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.searches[key]; known != nil && (!known.isDone() || time.Now().Before(known.until)) {
		return known
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), siblingTimeout)
	se := &search{cancel: cancel, done: make(chan struct{})}
	if s.closed {
		cancel()
		close(se.done)
		return se
	}
	if len(s.searches) >= maxSearches {
		clear(s.searches)
	}
	s.searches[key] = se
	s.wg.Go(func() {
		defer close(se.done)
		defer cancel()
		var err error
		se.found, err = s.cfg.Registry.Siblings(ctx, ref, manifest)
		se.until = time.Now().Add(nothingHold)
		switch {
		case err != nil:
			s.metrics.siblingFaults.WithLabelValues("search").Inc()
			s.cfg.Logger.Debug("siblings are not known, the original layers are taken", "image", ref, "error", err)
		case len(se.found) > 0:
			se.until = time.Now().Add(foundHold)
		}
	})
	return se
}

func (s *search) isDone() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// offer is a form in which a layer can be fetched.
type offer struct {
	candidate
	layer   registry.Layer
	sibling bool
	open    *openBlob // if set, it is on its way already
}

// openBlob is a blob that was opened before its reader was there: its context is its own, for the reader to end.
type openBlob struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

// Close implements io.Closer.
func (b *openBlob) Close() error {
	defer b.cancel(nil)
	return b.ReadCloser.Close()
}

// originalOf offers the layer as the image has it.
func originalOf(l registry.Layer) offer {
	encoding := "tar"
	for _, e := range []string{"gzip", "zstd"} {
		if strings.HasSuffix(l.MediaType, e) {
			encoding = e
		}
	}
	return offer{candidate: candidate{encoding: encoding, size: l.Size}, layer: l}
}

// best chooses between the original and its siblings.
func (s *siblings) best(ref string, l registry.Layer, found []registry.Sibling) offer {
	offers := []offer{originalOf(l)}
	for _, f := range found {
		known := f.Encoding == string(layer.EncodingZstd) || f.Encoding == string(layer.EncodingLZ4)
		if f.Original != l.Digest || f.DiffID != l.DiffID || !known || f.FrameBytes != layer.FrameBytes || s.isUnusable(f.Digest) {
			continue
		}
		offers[0].bytes = f.Bytes
		offers = append(offers, offer{candidate: candidate{f.Encoding, f.Size, f.Bytes, true}, layer: f.Layer, sibling: true})
	}
	if len(offers) == 1 {
		return offers[0]
	}
	candidates := make([]candidate, len(offers))
	for i, o := range offers {
		candidates[i] = o.candidate
	}
	return offers[s.measure.choose(ref, candidates)]
}

func (s *siblings) isUnusable(blob digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, bad := s.unusable[blob]
	return bad
}

// giveUp notes that a sibling could not be used.
func (s *siblings) giveUp(j *job, o offer, err error) {
	reason := "other"
	switch {
	case errors.Is(err, layer.ErrCorrupt), errors.Is(err, errTruncated):
		reason = "corrupt"
	case errors.Is(err, registry.ErrNotFound):
		reason = "not_found"
	case errors.Is(err, registry.ErrUnauthorized):
		reason = "unauthorized"
	case errors.Is(err, errStalled):
		reason = "stalled"
	}
	s.metrics.siblingFaults.WithLabelValues(reason).Inc()
	s.cfg.Logger.Warn("sibling of a layer cannot be used, the original is taken", "image", j.ref, "layer", j.layer.Digest,
		"sibling", o.layer.Digest, "encoding", o.encoding, "error", err)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.unusable) >= maxSearches {
		clear(s.unusable)
	}
	s.unusable[o.layer.Digest] = struct{}{}
}

// attempt produces a layer from the best of its forms, and from the original if that goes wrong.
func (s *jobs) attempt(ctx context.Context, j *job) (staged string, err error) {
	o, err := s.offer(ctx, j)
	if err != nil {
		return "", err
	}
	staged, err = s.produce(ctx, j, o)
	if o.sibling && err != nil && ctx.Err() == nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		s.siblings.giveUp(j, o, err)
		if staged != "" {
			wipe(s.cfg.Logger, staged)
		}
		o = originalOf(j.layer)
		staged, err = s.produce(ctx, j, o)
	}
	if err == nil {
		form := "original"
		if o.sibling {
			form = o.encoding
		}
		s.metrics.encodings.WithLabelValues(form).Inc()
		s.siblings.measure.learn(o.encoding, j.result)
	}
	return staged, err
}

// offer decides in which form to fetch a layer. As long as it is not known whether there are siblings, the original is fetched
// already, so that an image without any loses nothing.
func (s *jobs) offer(ctx context.Context, j *job) (offer, error) {
	if s.cfg.Blobs != nil { // whoever keeps blobs wants the image's
		return originalOf(j.layer), nil
	}
	if j.search.isDone() {
		return s.siblings.best(j.ref, j.layer, j.search.found), nil
	}
	open, cancel := context.WithCancelCause(ctx)
	blob, err := s.cfg.Registry.Open(open, j.ref, j.layer)
	src := &openBlob{blob, cancel}
	if err != nil {
		cancel(nil)
		return originalOf(j.layer), nil // which then says why
	}
	patience := time.NewTimer(siblingPatience)
	defer patience.Stop()
	o := originalOf(j.layer)
	select {
	case <-j.search.done:
		o = s.siblings.best(j.ref, j.layer, j.search.found)
	case <-patience.C:
	case <-ctx.Done():
		return o, errors.Join(context.Cause(ctx), src.Close())
	}
	if o.sibling {
		_ = src.Close() // nothing was read of it
		return o, nil
	}
	o.open = src
	return o, nil
}

// linkReader measures the link that it reads from.
type linkReader struct {
	io.ReadCloser
	link *link
}

// Read implements io.Reader.
func (r *linkReader) Read(p []byte) (int, error) {
	r.link.begin(time.Now())
	n, err := r.ReadCloser.Read(p)
	r.link.end(time.Now(), n)
	return n, err
}
