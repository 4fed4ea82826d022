package registry

import "time"

const (
	// startParallel is moderate, and enough for a registry that is near: there more requests mostly cost caches and bring nothing.
	// A first byte that takes farAway is from one that is not, where a connection often is not let have all of the link;
	// farParallel fill a gigabit at 40 MB/s each, waits included.
	startParallel = 4
	farParallel   = 8
	farAway       = 10 * time.Millisecond
	// startRangeBytes is the size of a range until more is known, and from then on the least for a link of ordinary speed.
	startRangeBytes = 4 << 20
	// epoch is how long a number of requests is watched before it is judged.
	epoch = 200 * time.Millisecond
	// minHold is how many epochs pass before fewer requests are tried, and maxHold how many pass between two trials when none
	// has paid for long.
	minHold = 8
	maxHold = 64
	// cutHold is how many epochs a host that was too busy is left with the lower limit.
	cutHold = 50
	// minSamples is how many ranges have to come before one can be called late.
	minSamples = 4
	// lateFactor is how much longer than others a range may take, and lateFloor how long it may take anyway.
	lateFactor = 3
	lateFloor  = 200 * time.Millisecond
)

// tuner finds out how many requests at once a host is best asked with, and for how much each. It climbs: for an epoch it tries
// a third more, keeps that if the host brought clearly more, and goes back if not; then it tries a few less, and keeps those if
// the host brought as much. Between trials it waits, longer and longer if they fail. An epoch in which nobody would have asked for more
// says nothing. (After the probing of TCP's congestion control; the measure is bytes a second, as a registry's limits show in
// nothing else but answers of 429.)
//
// It has no lock and no clock of its own.
type tuner struct {
	limit, max         int
	minRange, maxRange int64

	since   time.Time     // when the epoch began
	begun   int64         // bytes until then
	marked  time.Time     // until when full is counted
	wanting bool          // since marked
	full    time.Duration // of the epoch in which more was wanted

	settled time.Time // when what was asked for before the last change has come
	base    int       // the limit that has proved itself
	rate    float64   // bytes a second with base
	trial   bool      // limit is tried
	up      bool      // the direction of this or the next trial
	hold    int       // epochs until the next trial
	pause   int       // epochs to hold after the next trial that fails

	samples          int
	first, eachBytes float64 // seconds to the first byte, and for each byte after it
}

func newTuner(maxParallel int, minRange, maxRange int64, now time.Time) *tuner {
	start := min(startParallel, maxParallel)
	return &tuner{
		limit: start, base: start, max: maxParallel, minRange: minRange, maxRange: maxRange,
		since: now, marked: now, up: true, pause: 1,
	}
}

// mark says that until now things were as they were marked last.
func (t *tuner) mark(now time.Time, wanting bool) {
	if t.wanting {
		t.full += now.Sub(t.marked)
	}
	t.marked, t.wanting = now, wanting
}

// judge ends the epoch if it is time, and says what follows from it. bytes is all that has come from the host.
func (t *tuner) judge(now time.Time, bytes int64) {
	if now.Before(t.settled) {
		return
	}
	if t.since.Before(t.settled) {
		t.restart(now, bytes)
		return
	}
	elapsed := now.Sub(t.since)
	if elapsed < epoch {
		return
	}
	rate, wanted := float64(bytes-t.begun)/elapsed.Seconds(), 4*t.full >= 3*elapsed
	t.restart(now, bytes)
	switch {
	case !wanted:
	case !t.trial:
		t.rate = smooth(t.rate, rate, t.rate == 0)
		if t.hold--; t.hold < 0 {
			t.try(now)
		}
	case t.pays(rate):
		t.base, t.rate = t.limit, rate
		if t.up {
			t.pause = 1
			t.try(now)
			return
		}
		t.trial, t.hold = false, minHold
	default:
		t.back(now)
	}
}

func (t *tuner) restart(now time.Time, bytes int64) { t.since, t.begun, t.full = now, bytes, 0 }

// try sets the limit for the next epoch.
func (t *tuner) try(now time.Time) {
	t.limit = min(t.base+max(t.base/3, 1), t.max)
	if !t.up {
		t.limit = max(t.base-max(t.base/8, 1), min(2, t.base))
	}
	t.trial = true
	if t.limit == t.base {
		t.back(now)
		return
	}
	t.settle(now)
}

// pays says whether the limit on trial is better than base. More requests have to bring a sixth of what they would if nothing
// but their number was the bound.
func (t *tuner) pays(rate float64) bool {
	if !t.up {
		return rate >= t.rate
	}
	return rate >= t.rate*(1+float64(t.limit-t.base)/float64(6*t.base))
}

// back ends a trial that did not pay. The next goes the other way.
func (t *tuner) back(now time.Time) {
	t.limit, t.trial, t.up = t.base, false, !t.up
	t.hold, t.pause = t.pause, min(2*t.pause, maxHold)
	if !t.up {
		t.hold = max(t.hold, minHold)
	}
	t.settle(now)
}

// cut is for a host that is too busy.
func (t *tuner) cut(now time.Time, bytes int64) {
	t.limit = max(t.limit/2, 1)
	t.base, t.trial, t.up, t.rate = t.limit, false, true, 0
	t.hold, t.pause = cutHold, 1
	t.settle(now)
	t.restart(now, bytes)
}

// settle waits until ranges of before the change have ended and those of after it have begun.
func (t *tuner) settle(now time.Time) {
	span := time.Duration((t.first + t.eachBytes*float64(t.rangeBytes())) * float64(time.Second))
	t.settled = now.Add(min(max(span, epoch/10), 2*epoch))
}

func (t *tuner) sample(bytes int64, first, all time.Duration) {
	if bytes <= 0 {
		return
	}
	fresh := t.samples == 0
	if fresh && first >= farAway && t.limit == startParallel && !t.trial {
		t.limit = min(farParallel, t.max)
		t.base = t.limit
	}
	t.samples = min(t.samples+1, minSamples)
	t.first = smooth(t.first, first.Seconds(), fresh || first.Seconds() < t.first/2) // the first have to dial and to get a token
	t.eachBytes = smooth(t.eachBytes, max(all-first, 0).Seconds()/float64(bytes), fresh)
}

func smooth(old, sample float64, fresh bool) float64 {
	if fresh {
		return sample
	}
	return old + (sample-old)/8
}

// rangeBytes is large enough that the wait for the first byte is a small part of the whole, and small enough that a range takes
// no more than a second or two: what is lost with a connection, and what the reader waits for, should be little.
func (t *tuner) rangeBytes() int64 {
	size := float64(startRangeBytes)
	if t.samples > 0 && t.eachBytes > 0 {
		size = min(max(size, 8*t.first/t.eachBytes), 2/t.eachBytes)
	}
	blocks := max(int64(size)/maxBlockBytes, 1)
	return min(max(blocks*maxBlockBytes, t.minRange), t.maxRange)
}

// far tells whether the registry is not near, by all that is known.
func (t *tuner) far() bool { return t.samples > 0 && t.first >= farAway.Seconds() }

// worth is the least that a request of its own is worth, where more requests would end sooner: it takes a few times longer than
// the wait for its first byte.
func (t *tuner) worth() int64 {
	size := float64(startRangeBytes / 4)
	if t.samples > 0 && t.eachBytes > 0 {
		size = 4 * t.first / t.eachBytes
	}
	return max(min(int64(size), t.rangeBytes()), t.minRange)
}

func (t *tuner) overdue(bytes int64) time.Duration {
	if t.samples < minSamples {
		return 0
	}
	expected := t.first + t.eachBytes*float64(bytes)
	return lateFloor + time.Duration(lateFactor*expected*float64(time.Second))
}
