package bench

import (
	"fmt"
	"strings"
)

// Bound is something that must hold, and whether it does in this run.
type Bound struct {
	Case  string  `json:"case"`
	What  string  `json:"what"`
	Seen  float64 `json:"seen"`
	Limit float64 `json:"limit"`
	Unit  string  `json:"unit"`
	Holds bool    `json:"holds"`
}

// String is a line for people.
func (b Bound) String() string {
	verdict, sign := "holds ", "at most"
	if !b.Holds {
		verdict = "BROKEN"
	}
	if b.Unit == timesUnit {
		sign = "at least"
	}
	return fmt.Sprintf("%s  %s %s: %s %s, %s %s", verdict, b.Case, b.What, number(b.Seen), b.Unit, sign, number(b.Limit))
}

// timesUnit is that of ratios, which must not be less than their limit; all else must not be more.
const timesUnit = "times"

func (r *Report) bound(testCase, what, unit string, seen, limit float64) {
	holds := seen <= limit
	if unit == timesUnit {
		holds = seen >= limit
	}
	r.Bounds = append(r.Bounds, Bound{testCase, what, seen, limit, unit, holds})
}

// latency is what hand-offs of a kind may take, in ms; 0 is no limit.
type latency struct{ p50, p99 float64 }

// latencies that one start at a time must keep to.
func latencies(c handoffCase) latency {
	switch {
	case c.degree == fromRevision:
		return latency{5, 20}
	case c.runtime == "native", c.runtime == "node":
		return latency{20, 60}
	case c.runtime == "python":
		return latency{p50: 40}
	case c.runtime == "java":
		return latency{p50: 120}
	}
	return latency{}
}

const (
	sandboxAdds = 80 // ms that a start from a sandbox may take longer than the bare process
	burstFactor = 10 // by which the worst of 50 starts at once may exceed the median of one
	burstStarts = 50
	frozenGain  = 10 // by which a thaw must beat a plain pod
	runtimeGain = 5  // by which a booted Runtime must
)

// handoffBounds says of what was measured whether it holds. What was not measured is not spoken of: its case is an error.
func (r *Report) handoffBounds() {
	for _, row := range append([]Row(nil), r.Rows...) {
		c, err := parseHandoffCase(row.Case)
		if err != nil || row.System != "hearth" || row.Metric != lastByte {
			continue
		}
		if limit := latencies(c); c.n == 1 {
			if limit.p50 > 0 {
				r.bound(row.Case, "p50", "ms", row.P50, limit.p50)
			}
			if limit.p99 > 0 {
				r.bound(row.Case, "p99", "ms", row.P99, limit.p99)
			}
		}
		r.againstPeers(c, row)
		one := handoffCase{c.runtime, c.degree, 1}
		if serial := r.Row(one.String(), "hearth", lastByte); c.n == burstStarts && serial != nil {
			r.bound(row.Case, fmt.Sprintf("p99, of %d times the p50 of %s", burstFactor, one), "ms", row.P99, burstFactor*serial.P50)
		}
	}
}

// againstPeers compares with what ran beside it.
func (r *Report) againstPeers(c handoffCase, row Row) {
	gain := map[string]float64{fromRevision: frozenGain, fromRuntime: runtimeGain}[c.degree]
	if plain := r.Row(row.Case, "cri", lastByte); plain != nil && gain > 0 {
		r.bound(row.Case, "p50 below that of a plain pod", timesUnit, plain.P50/row.P50, gain)
	}
	if bare := r.Row(row.Case, "process", lastByte); bare != nil {
		r.bound(row.Case, "p50 above that of the bare process", "ms", row.P50-bare.P50, sandboxAdds)
	}
}

// boundLines are for the table.
func (r *Report) boundLines() (lines []string) {
	for _, b := range r.Bounds {
		lines = append(lines, strings.TrimSpace(b.String()))
	}
	return lines
}
