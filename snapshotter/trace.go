package snapshotter

import (
	"sync"
	"time"

	"github.com/hearth-serverless/hearth/layer"
)

// Names of the phases of a pull.
const (
	phaseResolve    = "resolve"    // read manifest and config
	phaseWait       = "wait"       // for a place among the layers in flight
	phaseFetch      = "fetch"      // from the first layer's first byte to the last one's last
	phaseDecompress = "decompress" //
	phaseVerify     = "verify"     // hash blobs and tars
	phaseUnpack     = "unpack"     // parse tars and write files
	phaseSync       = "sync"       // make trees durable
	phaseCommit     = "commit"     // make snapshots of them
)

// maxTraces bounds how many images' last pulls are remembered.
const maxTraces = 128

// Phase is an interval in which one part of a pull was under way, for at least one layer. Phases overlap.
type Phase struct {
	Name     string
	Start    time.Time
	Duration time.Duration
}

// trace is the record of one pull of one image: its phases and how far its layers are.
type trace struct {
	key   sessionKey
	begun time.Time

	mu     sync.Mutex // guards all below
	phases []Phase
	layers []layerRecord
	last   time.Time // when something was last heard of it
	ended  bool
	err    error // the last one
}

// add widens the phase to an interval. What was done before the pull began, for another image, does not count.
func (t *trace) add(name string, start, end time.Time) {
	if start.IsZero() || end.Before(t.begun) {
		return
	}
	if start.Before(t.begun) {
		start = t.begun
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, p := range t.phases {
		if p.Name != name {
			continue
		}
		last := p.Start.Add(p.Duration)
		if end.After(last) {
			last = end
		}
		if start.Before(p.Start) {
			p.Start = start
		}
		t.phases[i] = Phase{Name: name, Start: p.Start, Duration: last.Sub(p.Start)}
		return
	}
	t.phases = append(t.phases, Phase{Name: name, Start: start, Duration: end.Sub(start)})
}

// addJob adds the phases of a layer.
func (t *trace) addJob(j *job) {
	t.brought(j)
	if j.result == nil {
		return
	}
	t.add(phaseWait, j.queued[0], j.queued[1])
	tm := j.result.Timings
	for _, s := range []struct {
		name  string
		stage layer.Stage
	}{
		{phaseFetch, tm.Fetch}, {phaseDecompress, tm.Decompress}, {phaseVerify, tm.Digest}, {phaseVerify, tm.DiffID},
		{phaseUnpack, tm.Tar}, {phaseUnpack, tm.Write},
	} {
		t.add(s.name, s.stage.Start, s.stage.End)
	}
	t.add(phaseSync, j.synced[0], j.synced[1])
}

// traces are the last pulls by image reference, the oldest forgotten.
type traces struct {
	mu    sync.Mutex // guards by and order
	by    map[string]*trace
	order []string // of beginning
}

// begin replaces what is known of an image by a new pull.
func (t *traces) begin(key sessionKey) *trace {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, r := range t.order {
		if r == key.ref {
			t.order = append(t.order[:i], t.order[i+1:]...)
			break
		}
	}
	if len(t.order) == maxTraces {
		delete(t.by, t.order[0])
		t.order = t.order[1:]
	}
	tr := &trace{key: key, begun: time.Now()}
	t.by[key.ref], t.order = tr, append(t.order, key.ref)
	return tr
}

// of is the last pull of an image, or nil.
func (t *traces) of(ref string) *trace {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.by[ref]
}

// Trace returns the phases of the last pull of an image, by the reference that containerd pulled it by, in the order in which
// they began. An image whose layers were all there has none but the commits. The last 128 images are remembered.
func (s *Snapshotter) Trace(imageRef string) ([]Phase, bool) {
	tr := s.traces.of(imageRef)
	if tr == nil {
		return nil, false
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	phases := append([]Phase(nil), tr.phases...)
	sortPhases(phases)
	return phases, true
}
