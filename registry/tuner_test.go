package registry

import (
	"testing"
	"time"
)

// climb runs the tuner against a host that brings rate(limit) bytes a second, for so many epochs in which more was wanted, and
// returns the limits it has been at.
func climb(tn *tuner, now time.Time, epochs int, rate func(limit int) float64) (limits []int, end time.Time) {
	bytes := tn.begun
	for range epochs {
		for range 8 {
			now = now.Add(epoch / 4)
			bytes += int64(rate(tn.limit) * (epoch / 4).Seconds())
			tn.mark(now, true)
			tn.judge(now, bytes)
		}
		limits = append(limits, tn.limit)
	}
	return limits, now
}

func TestTunerFindsTheKnee(t *testing.T) {
	const mb = 1e6
	tests := []struct {
		name     string
		rate     func(limit int) float64
		max      int
		min, top int // where the limit must come to rest
	}{
		{"each connection brings 40 of 125", func(n int) float64 { return min(float64(n)*33*mb, 125*mb) }, 32, 4, 10},
		{"each connection brings 5 of 100", func(n int) float64 { return min(float64(n)*5*mb, 100*mb) }, 32, 18, 27},
		{"one connection brings all", func(int) float64 { return 100 * mb }, 32, 2, 8},
		{"more than four is worse", func(n int) float64 { return 100 * mb / float64(1+max(n-4, 0)) }, 32, 2, 5},
		{"no bound but ours", func(n int) float64 { return float64(n) * mb }, 12, 11, 12},
		{"one at a time", func(n int) float64 { return float64(n) * mb }, 1, 1, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tn := newTuner(tt.max, minRangeBytes, DefaultMaxRangeBytes, time.Unix(0, 0))
			limits, _ := climb(tn, time.Unix(0, 0), 400, tt.rate)
			settled := limits[len(limits)-50:]
			within := 0
			for _, n := range settled {
				if n < 1 || n > tt.max {
					t.Fatalf("limit %d", n)
				}
				if n >= tt.min && n <= tt.top {
					within++
				}
			}
			if within < 45 { // the rest are trials
				t.Errorf("limits at the end are %v, want %d to %d", settled, tt.min, tt.top)
			}
		})
	}
}

func TestTunerStartsWithMoreFarAway(t *testing.T) {
	for first, want := range map[time.Duration]int{time.Millisecond: startParallel, farAway: farParallel} {
		tn := newTuner(32, minRangeBytes, DefaultMaxRangeBytes, time.Unix(0, 0))
		tn.sample(1<<20, first, time.Second)
		if tn.sample(1<<20, farAway, time.Second); tn.limit != want {
			t.Errorf("limit %d after a first byte in %v, want %d", tn.limit, first, want)
		}
	}
}

func TestTunerIsNotDeceivedByIdleness(t *testing.T) {
	now := time.Unix(0, 0)
	tn := newTuner(32, minRangeBytes, DefaultMaxRangeBytes, now)
	for i := range 100 {
		now = now.Add(epoch)
		tn.mark(now, false)
		tn.judge(now, int64(i)<<20)
	}
	if tn.limit != startParallel {
		t.Errorf("limit %d without anybody wanting more", tn.limit)
	}
}

func TestTunerBacksOffAndRecovers(t *testing.T) {
	now := time.Unix(0, 0)
	tn := newTuner(32, minRangeBytes, DefaultMaxRangeBytes, now)
	for want := startParallel / 2; want >= 1; want /= 2 {
		if tn.cut(now, 0); tn.limit != want {
			t.Errorf("limit %d, want %d", tn.limit, want)
		}
	}
	if tn.cut(now, 0); tn.limit != 1 {
		t.Errorf("limit %d", tn.limit)
	}
	rate := func(n int) float64 { return float64(n) * 1e6 }
	if limits, _ := climb(tn, now, cutHold/3, rate); limits[len(limits)-1] != 1 {
		t.Errorf("limits %v right after the host was too busy", limits)
	}
	if limits, _ := climb(tn, tn.since, 200, rate); limits[len(limits)-1] < startParallel {
		t.Errorf("limits %v long after the host was too busy", limits)
	}
}

func TestRangeSize(t *testing.T) {
	const mb = 1 << 20
	tests := []struct {
		name     string
		first    time.Duration
		rate     float64 // bytes a second of a connection
		min, max int64
	}{
		{"loopback", 300 * time.Microsecond, 1 << 30, 4 * mb, 4 * mb},
		{"near", 20 * time.Millisecond, 40e6, 6 * mb, 7 * mb},
		{"far", 150 * time.Millisecond, 40e6, 16 * mb, 16 * mb},
		{"slow", 50 * time.Millisecond, 1e6, mb, 2 * mb},
		{"very slow", 50 * time.Millisecond, 10e3, minRangeBytes, minRangeBytes},
	}
	for _, tt := range tests {
		tn := newTuner(32, minRangeBytes, DefaultMaxRangeBytes, time.Unix(0, 0))
		if got := tn.rangeBytes(); got != startRangeBytes {
			t.Errorf("%d before anything is known", got)
		}
		all := tt.first + time.Duration(8*mb/tt.rate*float64(time.Second))
		for range 50 {
			tn.sample(8*mb, tt.first, all)
		}
		if got := tn.rangeBytes(); got < tt.min || got > tt.max {
			t.Errorf("%s: %d", tt.name, got)
		}
		if late := tn.overdue(8 * mb); late < 2*all || late > 4*all+lateFloor {
			t.Errorf("%s: a range that takes %v is late after %v", tt.name, all, late)
		}
	}
}
