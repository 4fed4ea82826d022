package disk

import (
	"sync"
	"time"
)

// Speed is what reads take: a request waits for Latency, beside others that wait as well, and then for its bytes, which all requests
// get one after the other at BytesPerSecond. So many small reads at once take no longer than one, until the rate is the limit, as it
// is on a cloud's disk. The zero Speed is the machine's own disk.
type Speed struct {
	BytesPerSecond int64         `json:"bytes_per_second"`
	Latency        time.Duration `json:"latency"`
}

// Named returns the disks that suites know.
func Named() map[string]Speed {
	return map[string]Speed{
		"machine": {},
		"limited": {BytesPerSecond: 100_000_000, Latency: 500 * time.Microsecond},
	}
}

// pacer says when requests are answered.
type pacer struct {
	speed Speed

	mu   sync.Mutex    // guards free
	free time.Duration // when the bytes of all requests until now have come
}

// due is when the last byte of a request has come that is made now. Times are of any one clock. They are kept exactly, so that an
// answer that comes late takes nothing of the rate.
func (p *pacer) due(now time.Duration, bytes int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = max(p.free, now+p.speed.Latency) + time.Duration(int64(bytes)*int64(time.Second)/p.speed.BytesPerSecond)
	return p.free
}
