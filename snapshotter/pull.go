package snapshotter

import (
	"cmp"
	"errors"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/registry"
)

// LayerState is how far a layer of a pull is.
type LayerState string

// The states of a layer. Present, Ready, Left and Failed are final, but for a layer that is asked for again.
const (
	LayerWaiting  LayerState = "waiting"  // for a place among the layers in flight
	LayerFetching LayerState = "fetching" // and being unpacked
	LayerPresent  LayerState = "present"  // was on the disk
	LayerReady    LayerState = "ready"    // is on the disk now
	LayerLeft     LayerState = "left"     // to containerd, which pulls it itself
	LayerFailed   LayerState = "failed"
)

// LayerProgress is one layer of a Pull.
type LayerProgress struct {
	Digest  digest.Digest
	Bytes   int64 // of the blob, as the manifest says
	Fetched int64 // bytes of it so far
	State   LayerState
	Shared  bool // fetched for another image
}

// Pull is an image that is being pulled, or was.
type Pull struct {
	Image    string
	Manifest digest.Digest
	Begun    time.Time
	Ended    bool            // nothing is going on any more
	Layers   []LayerProgress // lowest first; none until the manifest is read
	Err      string          // what went wrong last
}

// layerRecord is what a trace knows of a layer. Guarded by trace.mu.
type layerRecord struct {
	layer    registry.Layer
	state    LayerState // of what the trace decides: present, left, failed, or empty
	job      *job       // that brings it; nil before and after
	shared   bool
	fetched  int64 // by the job, once it is over
	unpacked int64 // bytes on disk
}

// Pull tells how far the last pull of an image is, by the reference that containerd pulls it by. The last 128 are remembered. An
// image that was complete when containerd asked has none.
func (s *Snapshotter) Pull(imageRef string) (Pull, bool) {
	tr := s.traces.of(imageRef)
	if tr == nil {
		return Pull{}, false
	}
	return tr.pull(), true
}

func (t *trace) pull() Pull {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := Pull{Image: t.key.ref, Manifest: t.key.manifest, Begun: t.begun, Ended: t.ended}
	if t.err != nil {
		p.Err = t.err.Error()
	}
	for i := range t.layers {
		p.Layers = append(p.Layers, t.layers[i].progress())
	}
	return p
}

func (r *layerRecord) progress() LayerProgress {
	p := LayerProgress{Digest: r.layer.Digest, Bytes: r.layer.Size, Fetched: r.fetched, State: cmp.Or(r.state, LayerWaiting), Shared: r.shared}
	if j := r.job; j != nil {
		p.Fetched = j.fetched.Load()
		if r.state == "" && p.Fetched > 0 {
			p.State = LayerFetching
		}
	}
	return p
}

// describe lists an image's layers.
func (t *trace) describe(img *registry.Image) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.key.manifest = cmp.Or(t.key.manifest, img.Digest)
	for _, l := range img.Layers {
		t.layers = append(t.layers, layerRecord{layer: l})
	}
}

// record calls change with what is known of a layer; an image can have one twice.
func (t *trace) record(diffID digest.Digest, change func(*layerRecord)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.layers {
		if t.layers[i].layer.DiffID == diffID {
			change(&t.layers[i])
		}
	}
	t.last = time.Now()
}

// found notes that a layer was on the disk.
func (t *trace) found(diffID digest.Digest) {
	t.record(diffID, func(r *layerRecord) { r.state = LayerPresent })
}

// joined notes who brings a layer.
func (t *trace) joined(j *job) {
	t.record(j.layer.DiffID, func(r *layerRecord) { r.job, r.state, r.shared = j, "", j.ref != t.key.ref })
}

// brought notes what a job that is over has made of its layer.
func (t *trace) brought(j *job) {
	t.record(j.layer.DiffID, func(r *layerRecord) {
		if r.job == j && j.err == nil {
			r.state, r.fetched, r.unpacked = LayerReady, j.fetched.Load(), j.info.Bytes
		}
	})
}

// answered notes how a Prepare for a layer ended.
func (t *trace) answered(diffID digest.Digest, err error) error {
	if err != nil {
		t.mu.Lock()
		t.err, t.last = err, time.Now()
		t.mu.Unlock()
		state := LayerFailed
		if fb := (*fallback)(nil); errors.As(err, &fb) {
			state = LayerLeft
		}
		t.record(diffID, func(r *layerRecord) { r.state = state })
	}
	return err
}

// end closes the record and lets go of the jobs. It returns the pull's last line.
func (t *trace) end(complete bool) summary {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	s := summary{key: t.key, layers: len(t.layers), complete: complete, err: t.err, states: map[string]int{}}
	if t.last.After(t.begun) {
		s.duration = t.last.Sub(t.begun)
	}
	for i := range t.layers {
		r := &t.layers[i]
		if r.job != nil && r.state == "" {
			r.fetched = r.job.fetched.Load()
		}
		r.job = nil
		s.states[r.source()]++
		s.unpacked += r.unpacked
		if !r.shared {
			s.fetched += r.fetched
		}
	}
	s.phases = append(s.phases, t.phases...)
	sortPhases(s.phases)
	return s
}

// source says in a word where a layer came from.
func (r *layerRecord) source() string {
	switch {
	case r.state == LayerReady && r.shared:
		return "shared"
	case r.state == LayerReady:
		return "fetched"
	case r.state == "":
		return "given_up"
	}
	return string(r.state)
}

// summary is a pull in one line.
type summary struct {
	key               sessionKey
	layers            int
	states            map[string]int // of layers, by source
	complete          bool
	duration          time.Duration
	fetched, unpacked int64
	phases            []Phase
	err               error
}

// result is the metric's label.
func (s *summary) result() string {
	switch {
	case s.states[string(LayerFailed)] > 0:
		return resultError
	case s.err != nil:
		return resultFallback
	case !s.complete:
		return "given_up"
	}
	return resultRemote
}

// log writes the pull's one line.
func (s *summary) log(log *slog.Logger) {
	attrs := []any{
		"image", s.key.ref, "digest", s.key.manifest, "result", s.result(), "duration", s.duration.Round(time.Millisecond),
		"bytes_fetched", s.fetched, "bytes_unpacked", s.unpacked, "layers", s.layers,
	}
	for _, source := range layerSources {
		attrs = append(attrs, source, s.states[source])
	}
	if s.duration > 0 {
		attrs = append(attrs, "bytes_per_second", int64(float64(s.fetched)/s.duration.Seconds()))
	}
	phases := make([]any, 0, 2*len(s.phases))
	for _, p := range s.phases {
		phases = append(phases, p.Name, p.Duration.Round(time.Microsecond))
	}
	attrs = append(attrs, slog.Group("phases", phases...))
	if s.err != nil {
		attrs = append(attrs, "error", s.err)
	}
	log.Info("image pulled", attrs...)
}

// layerSources are the values of layerRecord.source.
var layerSources = []string{"fetched", "shared", string(LayerPresent), string(LayerLeft), string(LayerFailed), "given_up"}
