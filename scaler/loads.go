package scaler

import (
	"fmt"
	"math"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// lateAfter: a gateway that reports each second and has been silent for this long is missing. Its part of every Function is
	// then not covered.
	lateAfter = 3500 * time.Millisecond
	// dueAfter: up to here since its last report, a gateway has nothing to say yet. That time is not missing, or a window of a few
	// seconds would never be covered.
	dueAfter = 1500 * time.Millisecond
	// forgetAfter: a gateway that has been silent for this long is gone, and holds no scale any more.
	forgetAfter = time.Minute

	maxLoads    = 10_000
	maxGateways = 1000
	maxName     = 253
	maxInterval = time.Hour
)

// gateway is one reporter.
type gateway struct {
	seen  time.Time
	loads map[string]*load // by Function
}

// load is what one gateway says of one Function.
type load struct {
	window *Window
	now    int // in flight or queued
}

// loads is what all gateways say. Not safe for concurrent use.
type loads struct {
	gateways map[string]*gateway
}

// check refuses what no honest gateway sends.
func check(r *hearthv1.ReportRequest) error {
	if n := len(r.GetSubscriber()); n == 0 || n > maxName {
		return fmt.Errorf("subscriber: a name of 1 to %d bytes is needed, for example \"gateway-1\"", maxName)
	}
	if n := len(r.GetLoads()); n > maxLoads {
		return fmt.Errorf("loads: %d are too many; send at most %d", n, maxLoads)
	}
	for i, l := range r.GetLoads() {
		switch c := l.GetConcurrency(); {
		case l.GetFunction() == "" || len(l.GetFunction()) > maxName:
			return fmt.Errorf("loads[%d].function: %q is not a function's name", i, l.GetFunction())
		case math.IsNaN(c) || c < 0 || c > math.MaxInt32:
			return fmt.Errorf("loads[%d].concurrency: %v is not a concurrency", i, c)
		case l.GetQueued() < 0 || l.GetRequests() < 0:
			return fmt.Errorf("loads[%d]: a number of requests is negative", i)
		case l.GetInterval().AsDuration() < 0:
			return fmt.Errorf("loads[%d].interval: %s is negative", i, l.GetInterval().AsDuration())
		}
	}
	return nil
}

// add takes in a report and returns the Functions that were idle in this gateway and are no longer. A Function that a report
// leaves out has no load there: the gateway is alive and says what it has. Windows are as wide as policy says.
func (ls *loads) add(now time.Time, r *hearthv1.ReportRequest, width func(function string) time.Duration) (woken []string) {
	g := ls.gateways[r.GetSubscriber()]
	if g == nil {
		g = &gateway{seen: now, loads: map[string]*load{}}
		ls.gateways[r.GetSubscriber()] = g
	}
	named := make(map[string]bool, len(r.GetLoads()))
	for _, l := range r.GetLoads() {
		if width(l.GetFunction()) == 0 {
			continue // not a Function, or not one any more
		}
		named[l.GetFunction()] = true
		if g.set(now, l, width(l.GetFunction())) {
			woken = append(woken, l.GetFunction())
		}
	}
	// Not more than a late report may stand for: a longer gap is one that nobody measured.
	gap := min(now.Sub(g.seen), lateAfter)
	for name, l := range g.loads {
		if !named[name] {
			l.window.Add(now, 0, gap)
			l.now = 0
		}
	}
	g.seen = now
	return woken
}

func (g *gateway) set(now time.Time, l *hearthv1.Load, width time.Duration) (woken bool) {
	known := g.loads[l.GetFunction()]
	if known == nil || known.window.Width() != NewWindow(width).Width() {
		known = &load{window: NewWindow(width)}
		g.loads[l.GetFunction()] = known
	}
	before := known.now
	known.window.Add(now, l.GetConcurrency(), min(l.GetInterval().AsDuration(), maxInterval))
	total := int64(l.GetQueued())
	for _, n := range l.GetInFlight() {
		total += int64(max(0, n))
	}
	known.now = int(min(total, math.MaxInt32))
	return before == 0 && (known.now > 0 || l.GetConcurrency() > 0)
}

// sweep forgets gateways that are gone and Functions that are no more, and gives every gateway a window for each Function: from
// now on its silence about it means none.
func (ls *loads) sweep(now time.Time, functions map[string]Policy) {
	for name, g := range ls.gateways {
		if now.Sub(g.seen) > forgetAfter {
			delete(ls.gateways, name)
			continue
		}
		for function := range g.loads {
			if _, ok := functions[function]; !ok {
				delete(g.loads, function)
			}
		}
		for function, p := range functions {
			if g.loads[function] == nil {
				g.loads[function] = &load{window: NewWindow(p.Window)}
			}
		}
	}
}

// observe sums one Function over all gateways. Ready and Starting are left to the caller.
func (ls *loads) observe(now time.Time, function string) Observation {
	o := Observation{}
	if len(ls.gateways) > 0 {
		o.Covered = 1
	}
	for _, g := range ls.gateways {
		l := g.loads[function]
		if l == nil {
			o.Covered = 0
			continue
		}
		s := l.window.summary(now)
		switch quiet := max(0, now.Sub(g.seen)); { // a report may come while all are decided for
		case quiet > lateAfter:
			s.covered = 0
		case quiet <= dueAfter:
			s.covered = min(1, s.covered+quiet.Seconds()/l.window.Width().Seconds())
		}
		o.Covered = min(o.Covered, s.covered)
		o.Average, o.Recent, o.Peak, o.Now = o.Average+s.average, o.Recent+s.recent, o.Peak+s.peak, o.Now+l.now
	}
	return o
}
