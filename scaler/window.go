package scaler

import (
	"time"
)

const (
	bucketWidth = time.Second
	// recentWidth is the short window.
	recentWidth = 2 * time.Second
	// maxBuckets bounds a window's memory: an hour.
	maxBuckets = 3600
)

// bucket holds one second: load is concurrency × seconds, covered the seconds that were measured.
type bucket struct {
	second        int64
	load, covered float64
}

// Window remembers what one gateway measured of one Function, second by second, in constant memory. Not safe for concurrent use.
// Use NewWindow.
type Window struct {
	buckets []bucket
	width   time.Duration
}

// NewWindow makes a window of the given width, which is rounded up to a second and bounded to an hour.
func NewWindow(width time.Duration) *Window {
	n := min(max(int64((width+bucketWidth-1)/bucketWidth), int64(recentWidth/bucketWidth)), maxBuckets)
	// One more bucket for the second that is not over, and one for the one that leaves.
	return &Window{buckets: make([]bucket, n+2), width: time.Duration(n) * bucketWidth}
}

// Width is what the window covers.
func (w *Window) Width() time.Duration { return w.width }

// Add notes that the concurrency was c on average over the interval that ended now. What lies before the window is left out.
func (w *Window) Add(now time.Time, c float64, interval time.Duration) {
	interval = min(interval, w.width)
	for at := now.Add(-interval); at.Before(now); {
		end := at.Truncate(bucketWidth).Add(bucketWidth)
		if end.After(now) {
			end = now
		}
		b := w.bucket(at)
		seconds := end.Sub(at).Seconds()
		b.load += c * seconds
		b.covered += seconds
		at = end
	}
}

func (w *Window) bucket(at time.Time) *bucket {
	second := at.Unix()
	b := &w.buckets[int(second%int64(len(w.buckets))+int64(len(w.buckets)))%len(w.buckets)]
	if b.second != second {
		*b = bucket{second: second}
	}
	return b
}

// summary is what a window says of the time before now.
type summary struct{ average, recent, peak, covered float64 }

func (w *Window) summary(now time.Time) summary {
	var s summary
	var load, covered, recentLoad, recentCovered, measured float64
	first, recent := now.Add(-w.width).Unix(), now.Add(-recentWidth).Unix()
	for _, b := range w.buckets {
		if b.covered == 0 || b.second < first || b.second > now.Unix() {
			continue
		}
		load, covered = load+b.load, covered+b.covered
		measured += min(b.covered, bucketWidth.Seconds())
		if b.second >= recent {
			recentLoad, recentCovered = recentLoad+b.load, recentCovered+b.covered
		}
		// A sliver of a second says little of it.
		if b.covered >= bucketWidth.Seconds()/4 {
			s.peak = max(s.peak, b.load/b.covered)
		}
	}
	if covered > 0 {
		s.average = load / covered
	}
	if recentCovered > 0 {
		s.recent = recentLoad / recentCovered
	}
	s.covered = min(1, measured/w.width.Seconds())
	return s
}
