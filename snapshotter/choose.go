package snapshotter

import (
	"strings"
	"sync"
	"time"

	"github.com/hearth-serverless/hearth/layer"
)

// candidate is a form in which a layer can be had.
type candidate struct {
	encoding string
	size     int64 // of the blob
	bytes    int64 // of the tar
	frames   bool  // decodes on all cores; otherwise on one
}

// rates are what a node does in a second, as far as it has seen.
type rates struct {
	link   float64            // bytes from the registry, for all layers together
	decode map[string]float64 // bytes of tar that a core decodes
	digest float64            // bytes of a blob that a core hashes
	unpack float64            // bytes of tar that a core hashes, parses and writes
	cores  int
}

// duration estimates how long a layer takes that has the node to itself: as long as the slowest of what happens side by side,
// which is the link, all that the cores do, and the decoder if it can only use one of them.
func (r *rates) duration(c candidate) time.Duration {
	decode := float64(c.bytes) / r.decode[c.encoding]
	cores := (decode + float64(c.size)/r.digest + float64(c.bytes)/r.unpack) / float64(r.cores)
	longest := max(float64(c.size)/r.link, cores)
	if !c.frames {
		longest = max(longest, decode)
	}
	return time.Duration(longest * float64(time.Second))
}

// choose gives the index of the candidate that takes the shortest, or of the smaller one if there is hardly a difference: the
// link is shared with others.
func (r *rates) choose(candidates []candidate) int {
	best := 0
	for i, c := range candidates {
		b := candidates[best]
		took, least := r.duration(c), r.duration(b)
		if took < least-least/20 || took <= least+least/20 && c.size < b.size {
			best = i
		}
	}
	return best
}

// Rates to begin with, of one core of a server, in bytes a second. What a node does itself replaces them soon.
const (
	firstGzip   = 260e6
	firstZstd   = 900e6
	firstLZ4    = 2400e6
	firstTar    = 20e9 // nothing is to be decoded
	firstDigest = 1700e6
	firstUnpack = 350e6
	firstLink   = 125e6 // 1 Gb/s
	firstLocal  = 1.5e9 // a registry on this machine has no link before it
)

const (
	// learnBytes is the size of a tar below which a layer says little about rates.
	learnBytes = 8 << 20
	// learnWeight is how much one layer changes what is known.
	learnWeight = 0.3
	// maxLinks bounds the registries whose links are known.
	maxLinks = 64
)

// measure is what a node knows about its rates. It is safe for concurrent use.
type measure struct {
	mu    sync.Mutex // guards what follows
	rates rates      // link is not used
	links map[string]*link
}

func newMeasure(cores int) *measure {
	return &measure{
		rates: rates{
			decode: map[string]float64{"gzip": firstGzip, "zstd": firstZstd, "lz4": firstLZ4, "tar": firstTar},
			digest: firstDigest, unpack: firstUnpack, cores: cores,
		},
		links: map[string]*link{},
	}
}

// learn takes in how a layer went.
func (m *measure) learn(encoding string, res *layer.Result) {
	if res.TarBytes < learnBytes {
		return
	}
	t := res.Timings
	m.mu.Lock()
	defer m.mu.Unlock()
	blend := func(known float64, bytes int64, busy time.Duration) float64 {
		if busy <= 0 {
			return known
		}
		return known*(1-learnWeight) + learnWeight*float64(bytes)/busy.Seconds()
	}
	if known, ok := m.rates.decode[encoding]; ok && encoding != "tar" {
		m.rates.decode[encoding] = blend(known, res.TarBytes, t.Decompress.Busy)
	}
	m.rates.digest = blend(m.rates.digest, res.CompressedBytes, t.Digest.Busy)
	m.rates.unpack = blend(m.rates.unpack, res.TarBytes, t.DiffID.Busy+t.Tar.Busy+t.Write.Busy)
}

// choose picks one of the forms of a layer that comes from the registry of ref.
func (m *measure) choose(ref string, candidates []candidate) int {
	l := m.link(ref)
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.rates
	r.link = l.rate()
	return r.choose(candidates)
}

// link is the link to the registry of ref.
func (m *measure) link(ref string) *link {
	host, _, _ := strings.Cut(ref, "/")
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.links[host]
	if l == nil {
		if len(m.links) == maxLinks {
			clear(m.links) // they are measured again
		}
		l = newLink(host)
		m.links[host] = l
	}
	return l
}

const (
	// linkPrior is how much time of measuring the first guess is worth.
	linkPrior = 50 * time.Millisecond
	// linkMemory is the measured time after which what was before counts half.
	linkMemory = 2 * time.Second
)

// link measures how fast bytes come from a registry, for all its layers together: by the time in which someone waits for some.
// When no one ever waits, because unpacking is slower, it shows a rate as high as it then matters.
type link struct {
	mu      sync.Mutex // guards what follows
	waiting int
	since   time.Time // of which waiting was not 0
	bytes   float64
	busy    time.Duration
}

func newLink(host string) *link {
	first := firstLink
	if name, _, _ := strings.Cut(host, ":"); name == "localhost" || strings.HasPrefix(name, "127.") || strings.HasPrefix(host, "[::1]") {
		first = firstLocal
	}
	return &link{bytes: first * linkPrior.Seconds(), busy: linkPrior}
}

func (l *link) begin(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting++; l.waiting == 1 {
		l.since = now
	}
}

func (l *link) end(now time.Time, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bytes += float64(n)
	if l.waiting--; l.waiting == 0 {
		l.busy += now.Sub(l.since)
	}
	if l.busy > linkMemory {
		l.bytes, l.busy = l.bytes/2, l.busy/2
	}
}

// rate is in bytes a second.
func (l *link) rate() float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bytes / l.busy.Seconds()
}
