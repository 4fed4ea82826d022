package prefetch

import (
	"sync"
	"time"

	"github.com/hearth-serverless/hearth/prefetch/trace"
)

const (
	// Ripe is how many starts a profile is made of before it is told to others.
	Ripe = 3
	// recordEvery is how many starts of an image there are for each that is recorded, once its profile is ripe and was found to fit: so
	// it follows what changes.
	recordEvery = 16
	// maxRecordings are under way at once.
	maxRecordings = 4
	// learnTime bounds the search for what a trace names.
	learnTime = 20 * time.Second
	// replayedBefore is how long before a recorded start its replay may have begun.
	replayedBefore = 2 * time.Second
)

// Start is one that is recorded. A nil one is not.
type Start struct {
	f         *Prefetcher
	image     Image
	recording Recording
	begun     time.Time
	once      sync.Once

	mu    sync.Mutex // guards ready
	ready bool
}

// Begin records what a start of an image reads, in these absolute cgroup directories, which have to exist; or not, and then it returns
// nil: if enough is known of the image, or nothing can be recorded.
func (f *Prefetcher) Begin(image Image, cgroups []string) *Start {
	if f.idle(image) {
		return nil
	}
	if !f.due(image) {
		return nil
	}
	roots := make([]string, len(image.Layers))
	for i, l := range image.Layers {
		roots[i] = l.Dir
	}
	s := &Start{f: f, image: image, begun: time.Now()}
	var err error
	if s.recording, err = f.cfg.Tracer.Begin(cgroups, roots); err != nil {
		f.failed(err)
		f.ended(image)
		return nil
	}
	return s
}

// due counts a start, and says whether to record it. If so, it counts as a recording until it has ended.
func (f *Prefetcher) due(image Image) bool {
	p, _ := f.load(image.ChainID)
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.of(image.ChainID)
	k.layers = image.Layers
	k.count(time.Now())
	k.since++
	ripe := p != nil && p.Starts >= Ripe && k.checked
	if f.cfg.Tracer == nil || k.recording || f.recording >= maxRecordings || ripe && k.since < recordEvery && k.awaited == nil {
		return false
	}
	f.recording++
	k.recording, k.since = true, 0
	return true
}

// ended takes back what due has counted.
func (f *Prefetcher) ended(image Image) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.recording--
	k := f.of(image.ChainID)
	k.recording = false
	k.tell()
}

// failed says once that starts cannot be recorded.
func (f *Prefetcher) failed(err error) {
	f.metrics.recordings.WithLabelValues(outcomeTracer).Inc()
	f.cfg.Logger.Debug("a start was not recorded", "error", err)
	f.warned.Do(func() {
		f.cfg.Logger.Warn("what starts read cannot be recorded: they go on, and are helped by what is known already", "error", err)
	})
}

// Ready says that the start is ready: what it reads from now on is for its first requests.
func (s *Start) Ready() {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.ready = true
	s.mu.Unlock()
	s.recording.Ready()
}

// End ends the recording, and learns from it if Ready was called. That takes a while, in the background of all else: it is for a
// goroutine of the caller's. Further calls do nothing.
func (s *Start) End() {
	if s == nil {
		return
	}
	s.once.Do(func() {
		defer s.f.ended(s.image)
		t, err := s.recording.End()
		s.mu.Lock()
		ready := s.ready
		s.mu.Unlock()
		switch {
		case err != nil:
			s.f.failed(err)
		case !ready:
			s.f.metrics.recordings.WithLabelValues(outcomeStart).Inc()
		default:
			s.f.metrics.lost.Add(float64(t.Lost))
			aside(10, func() { s.learn(t) })
		}
	})
}

// learn merges what was recorded into the image's profile.
func (s *Start) learn(t trace.Trace) {
	f := s.f
	report := f.takeReport(s)
	places := map[fileID]fileKey{}
	blind := t.Method == trace.EBPFCold // to what is in memory, as all is that was read ahead
	if report != nil {
		if !blind {
			report.compare(f, s.image, t)
		}
		report.mu.Lock()
		for id, key := range report.files {
			places[id] = key
		}
		report.mu.Unlock()
	}
	resolve(s.image.Layers, wanted(t), places, time.Now().Add(learnTime))
	start := profileOf(t, places)
	if start == nil {
		f.metrics.recordings.WithLabelValues(outcomeNothing).Inc()
		return
	}
	before := 0
	p, encoded, err := f.store.change(s.image.ChainID, func(own *Profile) *Profile {
		if own != nil {
			before = own.Starts
		}
		if blind {
			start = start.withKnown(own)
		}
		return own.followed(start)
	})
	if err != nil {
		f.metrics.recordings.WithLabelValues(outcomeStore).Inc()
		f.cfg.Logger.Warn("profile not stored", "image", s.image.ChainID, "error", err)
		return
	}
	f.learnt(s.image.ChainID, p, before >= Ripe)
	f.metrics.recordings.WithLabelValues(outcomeLearned).Inc()
	f.cfg.Logger.Debug("start recorded", "image", s.image.ChainID, "starts", p.Starts, "files", len(p.Files), "bytes", start.Bytes(), "lost", t.Lost)
	if f.cfg.Learned != nil && before < Ripe && p.Starts >= Ripe {
		f.cfg.Learned(s.image.ChainID, encoded)
	}
}

// takeReport is what was read ahead of this start, if anything was.
func (f *Prefetcher) takeReport(s *Start) *report {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.of(s.image.ChainID)
	r := k.report
	if r == nil || r.begun.Before(s.begun.Add(-replayedBefore)) {
		return nil
	}
	k.report = nil
	return r
}

// share is the part of n that both is of all.
func share(n, both, all int64) int64 {
	if both >= all {
		return n
	}
	return min(n, int64(float64(n)*float64(both)/float64(all)))
}

// compare counts what was read ahead and needed, and what was not.
func (r *report) compare(f *Prefetcher, image Image, t trace.Trace) {
	needed := map[fileID][]Range{}
	for _, a := range t.Accesses {
		id := fileID{a.Device, a.Inode}
		needed[id] = cover(needed[id], Range{Offset: a.Offset, Length: a.Length})
	}
	var used, ahead int64
	r.mu.Lock()
	for id, list := range r.spans {
		for _, s := range list {
			var both int64
			for _, n := range needed[id] {
				both += max(0, min(s.end(), n.end())-max(s.offset, n.Offset))
			}
			ahead += s.missing
			used += share(s.missing, both, s.length) // which part of it was missing is not known
		}
	}
	r.mu.Unlock()
	f.metrics.used.Add(float64(used))
	f.metrics.inVain.Add(float64(ahead - used))
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.of(image.ChainID)
	k.usage.Used += used
	k.usage.InVain += ahead - used
}
