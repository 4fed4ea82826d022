package prefetch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// Mode is what is read ahead.
type Mode string

// The modes.
const (
	ModeProfile Mode = "profile" // what earlier starts have needed
	ModeWhole   Mode = "whole"   // every file of every layer
	ModeNone    Mode = "none"    // nothing, and nothing is recorded
)

// DefaultBudget bounds what is read ahead of one start.
const DefaultBudget = 256 << 20

// maxKnown is how many images' profiles are kept in memory; a start of another reads its from the disk.
const maxKnown = 128

// Config of a Prefetcher. Root is required.
type Config struct {
	Root   string // folder of profiles, this Prefetcher's own
	Mode   Mode   // default ModeProfile
	Budget int64  // bytes read ahead of one start; default DefaultBudget, and with ModeWhole no bound
	Keep   int64  // bytes of what several images need that are kept in memory; 0 is none
	Tracer Tracer // nil: nothing is recorded
	// Short tells whether the node is short of memory: then nothing is kept. Nil: it never is.
	Short func() (bool, error)
	// Learned is told when enough starts of an image were recorded here, with its encoded profile. It may take a while. Nil: nobody is.
	Learned    func(image digest.Digest, encoded []byte)
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Prefetcher keeps profiles of a node's images, records starts for them and reads ahead of starts. It is safe for concurrent use, and
// a nil one does nothing.
type Prefetcher struct {
	cfg     Config
	metrics *metrics
	store   *store
	warned  sync.Once // that starts cannot be recorded

	mu        sync.Mutex // guards what follows
	known     map[digest.Digest]*known
	recording int // under way
}

// known is what is remembered of an image since this Prefetcher was made.
type known struct {
	used    time.Time
	layers  []Layer
	loaded  bool
	profile *Profile // nil if there is none
	steps   []step   // its plan

	starts    float64 // that begun; each hour they count half
	counted   time.Time
	recording bool // a start of it
	checked   bool // a ripe profile was compared with a start
	since     int  // starts since the last one that was recorded

	replaying bool
	report    *report // of the last replay, until a recorded start takes it
	usage     Usage
}

// Usage says what came of reading ahead, in bytes.
type Usage struct {
	Image  digest.Digest
	Starts int   // that its profile is made of
	Hits   int64 // in memory already
	Ahead  int64 // read ahead
	// Used and InVain are parts of Ahead: what starts that were recorded have needed, and what not. Of other starts nobody knows.
	Used, InVain int64
}

// New opens the folder of profiles.
func New(cfg Config) (*Prefetcher, error) {
	cfg.Mode = cmp.Or(cfg.Mode, ModeProfile)
	if cfg.Budget == 0 {
		cfg.Budget = DefaultBudget
		if cfg.Mode == ModeWhole {
			cfg.Budget = 1 << 50
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if !slices.Contains([]Mode{ModeProfile, ModeWhole, ModeNone}, cfg.Mode) {
		return nil, fmt.Errorf("prefetch: mode %q is none of %s, %s, %s", cfg.Mode, ModeProfile, ModeWhole, ModeNone)
	}
	if cfg.Budget < 0 || cfg.Keep < 0 {
		return nil, errors.New("prefetch: a bound is negative")
	}
	s, err := openStore(cfg.Root, cfg.Logger)
	if err != nil {
		return nil, fmt.Errorf("prefetch: %w", err)
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("prefetch: %w", err)
	}
	return &Prefetcher{cfg: cfg, metrics: m, store: s, known: map[digest.Digest]*known{}}, nil
}

// idle says that nothing is done for an image.
func (f *Prefetcher) idle(image Image) bool {
	return f == nil || f.cfg.Mode == ModeNone || len(image.Layers) == 0 || image.ChainID.Validate() != nil
}

// Profile returns what is known of an image, encoded.
func (f *Prefetcher) Profile(image digest.Digest) ([]byte, bool) {
	if f == nil {
		return nil, false
	}
	_, encoded := f.store.read(image)
	return encoded, encoded != nil
}

// Learn adds a profile that comes from elsewhere, of which everything may be wrong.
func (f *Prefetcher) Learn(image digest.Digest, encoded []byte) error {
	if f == nil || f.cfg.Mode == ModeNone {
		return nil
	}
	foreign, err := Parse(encoded)
	if err != nil {
		return err
	}
	p, _, err := f.store.change(image, func(own *Profile) *Profile { return own.joined(foreign) })
	if err != nil {
		return err
	}
	f.learnt(image, p, false)
	return nil
}

// learnt puts a new profile in the place of the one in memory.
func (f *Prefetcher) learnt(image digest.Digest, p *Profile, checked bool) {
	steps := p.plan()
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.of(image)
	k.loaded, k.profile, k.steps, k.usage.Starts = true, p, steps, p.Starts
	k.checked = checked || k.checked
}

// of is what is remembered of an image; mu must be held. Of too many, those used least recently are forgotten.
func (f *Prefetcher) of(image digest.Digest) *known {
	k := f.known[image]
	if k == nil {
		k = &known{usage: Usage{Image: image}}
		f.known[image] = k
	}
	k.used = time.Now()
	for len(f.known) > maxKnown {
		var oldest digest.Digest
		for id, other := range f.known {
			if other != k && !other.recording && !other.replaying && (oldest == "" || other.used.Before(f.known[oldest].used)) {
				oldest = id
			}
		}
		if oldest == "" {
			break
		}
		delete(f.known, oldest)
	}
	return k
}

// load has an image's profile in memory, if there is one.
func (f *Prefetcher) load(image digest.Digest) (p *Profile, steps []step) {
	f.mu.Lock()
	k := f.of(image)
	p, steps = k.profile, k.steps
	loaded := k.loaded
	f.mu.Unlock()
	if loaded {
		return p, steps
	}
	if p, _ = f.store.read(image); p != nil {
		steps = p.plan()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if k = f.of(image); !k.loaded { // or somebody was faster, and may have learnt meanwhile
		k.loaded, k.profile, k.steps = true, p, steps
		if p != nil {
			k.usage.Starts = p.Starts
		}
	}
	return k.profile, k.steps
}

// Usage lists what came of reading ahead since this Prefetcher was made, for the images that were started last, by name.
func (f *Prefetcher) Usage() []Usage {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []Usage
	for _, k := range f.known {
		list = append(list, k.usage)
	}
	slices.SortFunc(list, func(a, b Usage) int { return cmp.Compare(a.Image, b.Image) })
	return list
}

// Replay reads ahead what a start of an image will need. It returns when the kernel was asked for all of it, or ctx has ended. Of an
// image that is not known it reads what is known of its layers from other images.
func (f *Prefetcher) Replay(ctx context.Context, image Image) {
	if f.idle(image) {
		return
	}
	f.mu.Lock()
	k := f.of(image.ChainID)
	k.layers = image.Layers
	busy := k.replaying
	k.replaying = true
	f.mu.Unlock()
	if busy { // for another start, which is as good
		return
	}
	ctx, cancel := context.WithTimeout(ctx, replayTime)
	defer cancel()
	r := &replay{report: newReport()}
	r.left.Store(f.cfg.Budget)
	f.mu.Lock()
	k.report = r.report
	f.mu.Unlock()
	f.read(ctx, r, image)
	r.report.mu.Lock()
	hits, ahead := r.report.hits, r.report.ahead
	r.report.mu.Unlock()
	took := time.Since(r.report.begun)
	f.metrics.hits.Add(float64(hits))
	f.metrics.ahead.Add(float64(ahead))
	f.metrics.seconds.Observe(took.Seconds())
	f.mu.Lock()
	k.replaying = false
	k.usage.Hits += hits
	k.usage.Ahead += ahead
	f.mu.Unlock()
	f.cfg.Logger.Debug("read ahead", "image", image.ChainID, "bytes", ahead, "in_memory", hits, "took", took)
}

func (f *Prefetcher) read(ctx context.Context, r *replay, image Image) {
	if f.cfg.Mode == ModeWhole {
		r.roots = openRoots(image.Layers)
		defer closeRoots(r.roots)
		r.whole(ctx, image.Layers)
		return
	}
	p, steps := f.load(image.ChainID)
	if p == nil {
		if p = f.borrow(image); p == nil {
			return
		}
		steps = p.plan()
	}
	r.roots = openRoots(image.Layers)
	defer closeRoots(r.roots)
	if r.inMemory(steps) {
		r.report.inMemory(bytesOf(steps))
		return
	}
	r.run(ctx, inTurn(steps))
}

// donors is from how many other images' profiles one is made for an image that has none.
const donors = 4

// borrow makes a profile of what others say of an image's layers, those with most layers in common first. What fewer than half of
// them need is not read then.
func (f *Prefetcher) borrow(image Image) *Profile {
	here := map[digest.Digest]bool{}
	for _, l := range image.Layers {
		here[l.DiffID] = true
	}
	var sum *Profile
	for n, donor := range f.store.relatives(image.Layers) {
		if n == donors {
			break
		}
		p, _ := f.load(donor)
		if p == nil {
			continue
		}
		part := &Profile{Starts: p.Starts, Weight: p.Weight, Lost: p.Lost}
		for _, file := range p.Files {
			if here[file.Layer] {
				part.Files = append(part.Files, file)
			}
		}
		if part = part.scaled(1 / part.Weight); sum == nil {
			sum = part
		} else {
			sum = sum.with(part)
		}
	}
	return sum
}
