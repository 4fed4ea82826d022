package trace

// SetBuffer has the programs of later recordings by eBPF use another buffer, of a power of two of bytes.
func (t *Tracer) SetBuffer(bytes uint32) { t.method.(*pages).buffer = bytes }

// Stall keeps whatever happens from the recording until release.
func (r *Recording) Stall() (release func()) {
	r.collector.mu.Lock()
	return r.collector.mu.Unlock
}

// Collector is that of a recording.
type Collector struct{ c *collector }

// NewCollector makes one for a device.
func NewCollector(device uint64) Collector { return Collector{newCollector([]root{{device: device}})} }

func (c Collector) Add(device, inode, first, pages uint64, at int64) {
	c.c.add(device, inode, first, pages, at)
}
func (c Collector) Ready() int64               { c.c.ready(); return c.c.readyAt }
func (c Collector) Result() ([]Access, uint64) { return c.c.result() }

// What a collector may hold.
const (
	MaxAccesses = maxAccesses
	MaxWords    = maxWords
)

// Words is how many it holds.
func (c Collector) Words() int { return len(c.c.seen) }

// ParseOpens is parseOpens, with as many events as it finds.
func ParseOpens(b []byte) (int, bool) {
	events, ok := parseOpens(b)
	return len(events), ok
}
