package layer

import "time"

// Stage is one stage of a layer's pipeline: when it began and ended, and how long it worked in between. The stages overlap, so
// the busy times add up to more than the layer took; what is missing to End minus Start is waiting for other stages.
type Stage struct {
	Start, End time.Time
	Busy       time.Duration
}

// Timings are the stages of one layer. Fetch is busy while it waits for the source; Write adds up all writers.
type Timings struct {
	Fetch, Digest, Decompress, DiffID, Tar, Write Stage
}

// clock measures one goroutine's part of a stage.
type clock struct {
	stage Stage
	since time.Time // zero while paused
}

func (c *clock) start() {
	c.stage.Start = time.Now()
	c.since = c.stage.Start
}

func (c *clock) pause() {
	c.stage.Busy += time.Since(c.since)
}

func (c *clock) resume() { c.since = time.Now() }

func (c *clock) stop() {
	c.stage.End = time.Now()
	c.stage.Busy += c.stage.End.Sub(c.since)
}

// merge adds another goroutine's part of the same stage.
func (s *Stage) merge(o Stage) {
	if o.Start.IsZero() {
		return
	}
	if s.Start.IsZero() || o.Start.Before(s.Start) {
		s.Start = o.Start
	}
	if o.End.After(s.End) {
		s.End = o.End
	}
	s.Busy += o.Busy
}
