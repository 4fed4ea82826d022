package gateway

import "time"

// meter measures one Function's concurrency (requests in flight or queued) as an integral over time, and counts arrivals.
// It holds what has not been reported yet, in constant space however long that takes. Guarded by its function's mutex.
type meter struct {
	current  int           // requests in flight or queued now
	area     time.Duration // integral of current over time, since the last report
	requests int64         // arrivals since the last report
	since    time.Time     // of the last report
	last     time.Time     // when area was brought up to date
}

func (m *meter) advance(now time.Time) {
	if d := now.Sub(m.last); d > 0 {
		m.area += time.Duration(m.current) * d
		m.last = now
	}
}

// change adds delta to the requests that are here.
func (m *meter) change(now time.Time, delta int) {
	m.advance(now)
	m.current += delta
}

// sample is a reading of a meter, to be taken off it once it is delivered.
type sample struct {
	area     time.Duration
	requests int64
	interval time.Duration
	at       time.Time
}

func (m *meter) read(now time.Time) sample {
	m.advance(now)
	return sample{area: m.area, requests: m.requests, interval: now.Sub(m.since), at: now}
}

func (m *meter) delivered(s sample) {
	m.area -= s.area
	m.requests -= s.requests
	m.since = s.at
}

// concurrency is the time average; over no time at all it is what a caller sees now.
func (s sample) concurrency() float64 {
	if s.interval <= 0 {
		return 0
	}
	return float64(s.area) / float64(s.interval)
}
