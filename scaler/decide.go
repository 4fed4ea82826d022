package scaler

import (
	"fmt"
	"math"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// DefaultUtilisation leaves 30 % of an Instance's concurrency as room for what comes while another one starts. It is the
	// field's value (Knative's target percentage).
	DefaultUtilisation = 0.7
	// enoughCovered of a window is as good as all of it: reports come a little early or late.
	enoughCovered = 0.9

	defaultConcurrency = 10
	defaultMax         = 10
	defaultWindow      = 60 * time.Second
	defaultGrace       = 30 * time.Second
)

// Policy is how one Function wants to be scaled.
type Policy struct {
	// Concurrency is how many requests an Instance serves at once, at most.
	Concurrency int
	// Utilisation is the share of it that is meant to be used, in (0, 1].
	Utilisation float64
	// Min and Max bound the answer; Min ≤ Max.
	Min, Max int
	// Window is what averages and peaks are taken over, and Grace is how long the last Instance stays after it fell silent.
	Window, Grace time.Duration
}

// PolicyOf fills in the defaults of a Function's scaling, which may be nil.
func PolicyOf(s *hearthv1.Scaling) Policy {
	p := Policy{
		Concurrency: int(s.GetConcurrency()), Utilisation: DefaultUtilisation, Min: int(s.GetMin()), Max: int(s.GetMax()),
		Window: s.GetWindow().AsDuration(), Grace: defaultGrace,
	}
	if p.Concurrency < 1 {
		p.Concurrency = defaultConcurrency
	}
	if p.Max < 1 {
		p.Max = max(defaultMax, p.Min)
	}
	p.Min = max(0, min(p.Min, p.Max))
	if p.Window <= 0 {
		p.Window = defaultWindow
	}
	if s.GetGrace() != nil {
		p.Grace = max(0, s.GetGrace().AsDuration())
	}
	return p
}

// target is the concurrency that one Instance should have: never below one request, so that with a concurrency of one there is
// one Instance per request and not more.
func (p Policy) target() float64 {
	return max(1, float64(p.Concurrency)*p.Utilisation)
}

// Observation is what was measured of a Function up to now, all gateways together.
type Observation struct {
	// Average concurrency (requests in flight or queued) over the window, Recent over the last two seconds, and Peak the
	// greatest of any second of the window. Only seconds that were measured count.
	Average, Recent, Peak float64
	// Now is how many requests are in flight or queued, by the last reports.
	Now int
	// Covered is the share of the window, 0 to 1, that was measured by every gateway that is there.
	Covered float64
	// Ready Instances serve; Starting ones are claimed for the Function or about to be.
	Ready, Starting int
}

// State is what a decision leaves for the next one. The zero value is a Function of which nothing is known.
type State struct {
	// SilentSince is when the window was first seen to be silent; zero while it is not.
	SilentSince time.Time
}

// Decision is a number of Instances, and why.
type Decision struct {
	Desired int
	Reason  string
}

// Decide says how many Instances a Function should have.
//
// It grows to concurrency / target, with the average over the window, or over the last two seconds when those are more than the
// ready Instances should bear. It shrinks to that as well, but keeps what the window's busiest second needed at full concurrency:
// an Instance stays for a window after it was last needed. It goes to zero when the window is silent and the grace has passed.
// While the window is not covered by measurements it does not shrink at all. From nothing it grows to the minimum only: a gateway
// with a request claims the first Instance itself, so another would be one too many, and what the window remembers of a Function
// that somebody released wants none.
func Decide(now time.Time, p Policy, s State, o Observation) (Decision, State) {
	have := o.Ready + o.Starting
	s = silence(now, s, o)
	if have == 0 {
		return clamp(p, Decision{0, "no instance yet: the first request claims one"}), s
	}
	d := grow(p, o)
	if d.Desired < have {
		d = shrink(now, p, s, o, d)
	}
	return clamp(p, d), s
}

func silence(now time.Time, s State, o Observation) State {
	silent := o.Covered >= enoughCovered && o.Average == 0 && o.Peak == 0 && o.Recent == 0 && o.Now == 0
	switch {
	case !silent:
		s.SilentSince = time.Time{}
	case s.SilentSince.IsZero():
		s.SilentSince = now
	}
	return s
}

func grow(p Policy, o Observation) Decision {
	d := Decision{
		Desired: instances(o.Average / p.target()),
		Reason:  fmt.Sprintf("average concurrency %.2f over %s, %.2g for each instance", o.Average, p.Window, p.target()),
	}
	if o.Recent > float64(o.Ready)*p.target() {
		if n := instances(o.Recent / p.target()); n > d.Desired {
			d = Decision{n, fmt.Sprintf("concurrency %.2f in the last seconds, more than %d ready instances should bear", o.Recent, o.Ready)}
		}
	}
	if d.Desired == 0 && o.Now > 0 {
		d = Decision{1, fmt.Sprintf("%d requests are here now", o.Now)}
	}
	return d
}

// shrink says how far below what is there a Function may go; wanted is less than that.
func shrink(now time.Time, p Policy, s State, o Observation, wanted Decision) Decision {
	have := o.Ready + o.Starting
	if o.Covered < enoughCovered {
		return Decision{have, fmt.Sprintf("held: %.0f%% of the last %s is measured", 100*o.Covered, p.Window)}
	}
	if peak := instances(o.Peak / float64(p.Concurrency)); peak > wanted.Desired {
		return Decision{min(have, peak), fmt.Sprintf("the busiest second of the last %s had concurrency %.2f", p.Window, o.Peak)}
	}
	if wanted.Desired > 0 {
		return wanted
	}
	if quiet := now.Sub(s.SilentSince); s.SilentSince.IsZero() || quiet < p.Grace {
		return Decision{1, fmt.Sprintf("no request for %s, the last instance stays for another %s", p.Window, p.Grace)}
	}
	return Decision{0, fmt.Sprintf("no request for %s", p.Window+p.Grace)}
}

func clamp(p Policy, d Decision) Decision {
	switch {
	case d.Desired < p.Min:
		return Decision{p.Min, fmt.Sprintf("minimum of %d", p.Min)}
	case d.Desired > p.Max:
		return Decision{p.Max, fmt.Sprintf("maximum of %d; %s", p.Max, d.Reason)}
	}
	return d
}

// instances rounds up, but forgives what only floating point adds.
func instances(n float64) int {
	const most = 1 << 20
	return int(min(math.Ceil(max(0, n)-1e-9), most))
}
