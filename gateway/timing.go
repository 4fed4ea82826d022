package gateway

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// TraceHeader on a request, with the value 1, asks for a Server-Timing header on its response, which ParseTiming reads.
const TraceHeader = "Hearth-Trace"

const (
	maxPhases     = 64
	maxPhaseBytes = 64 // of a phase's name
	maxTiming     = 32 << 10
)

// Phase is a part of a request's way to its first byte. Phases may overlap. Offset counts from the request's arrival at the
// gateway; it is negative for what had begun before, on behalf of an earlier request.
type Phase struct {
	Name                   string
	Offset, Duration, Busy time.Duration // Busy is 0 when it is not known
}

func phasesOf(phases []*hearthv1.Phase) []Phase {
	out := make([]Phase, 0, min(len(phases), maxPhases))
	for _, p := range phases[:min(len(phases), maxPhases)] {
		out = append(out, Phase{
			Name: p.GetName(), Offset: p.GetOffset().AsDuration(),
			Duration: p.GetDuration().AsDuration(), Busy: p.GetBusy().AsDuration(),
		})
	}
	return out
}

// formatTiming makes the value of a Server-Timing header (W3C), times in milliseconds:
//
//	create;dur=12.345;desc="offset=3.100";busy=4.000
func formatTiming(phases []Phase) string {
	var b strings.Builder
	for i, p := range phases {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, `%s;dur=%s;desc="offset=%s"`, token(p.Name), millis(p.Duration), millis(p.Offset))
		if p.Busy > 0 {
			b.WriteString(";busy=" + millis(p.Busy))
		}
	}
	return b.String()
}

func millis(d time.Duration) string {
	return strconv.FormatFloat(float64(d)/float64(time.Millisecond), 'f', 3, 64)
}

// token keeps a phase's name within what a header's token may be.
func token(name string) string {
	name = name[:min(len(name), maxPhaseBytes)]
	name = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '-', r == '.':
			return r
		}
		return '_'
	}, name)
	if name == "" {
		return "_"
	}
	return name
}

// ParseTiming reads the phases that a gateway put into Server-Timing headers. Entries of others, such as the Function's own,
// have no offset and are left out. Errors: an entry of ours with a number that is none, or more than a header may hold.
func ParseTiming(values []string) ([]Phase, error) {
	var phases []Phase
	for _, value := range values {
		if len(value) > maxTiming {
			return nil, fmt.Errorf("server-timing header of %d bytes: at most %d are read", len(value), maxTiming)
		}
		for entry := range strings.SplitSeq(value, ",") {
			p, ours, err := parsePhase(strings.TrimSpace(entry))
			if err != nil {
				return nil, fmt.Errorf("server-timing entry %q: %w", entry, err)
			}
			if ours {
				phases = append(phases, p)
			}
		}
	}
	return phases, nil
}

func parsePhase(entry string) (p Phase, ours bool, err error) {
	name, params, _ := strings.Cut(entry, ";")
	p.Name = strings.TrimSpace(name)
	offset := ""
	for param := range strings.SplitSeq(params, ";") {
		if key, value, _ := strings.Cut(strings.TrimSpace(param), "="); key == "desc" {
			offset, ours = strings.CutPrefix(strings.Trim(value, `"`), "offset=")
		}
	}
	if !ours {
		return p, false, nil
	}
	if p.Offset, err = parseMillis(offset); err != nil {
		return p, true, err
	}
	for param := range strings.SplitSeq(params, ";") {
		switch key, value, _ := strings.Cut(strings.TrimSpace(param), "="); key {
		case "dur":
			p.Duration, err = parseMillis(value)
		case "busy":
			p.Busy, err = parseMillis(value)
		}
		if err != nil {
			return p, true, err
		}
	}
	return p, true, nil
}

func parseMillis(s string) (time.Duration, error) {
	ms, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(ms) || math.Abs(ms) > 1e12 {
		return 0, fmt.Errorf("%q is no number of milliseconds", s)
	}
	return time.Duration(math.Round(ms * float64(time.Millisecond))), nil
}
