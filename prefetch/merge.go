package prefetch

import (
	"cmp"
	"slices"

	"github.com/opencontainers/go-digest"
)

const (
	// decay is what a start counts when another has been recorded after it.
	decay = 0.8
	// mostWeight bounds what all starts count together: it is where recording more of them ends.
	mostWeight = 1 / (1 - decay)
	// foreignWeight bounds what a profile counts that comes from elsewhere. Three starts of our own count 2.44 and outweigh it.
	foreignWeight = 2
	// forgotten is the part of the weight below which a range is left out.
	forgotten = 0.05
	// nearOrder is how far ranges of a file that touch may be apart in the order of need to be one range.
	nearOrder = 512
)

// scaled is the profile with its starts counting that much more.
func (p *Profile) scaled(by float64) *Profile {
	q := p.clone()
	q.Weight *= by
	for i := range q.Files {
		for j := range q.Files[i].Ranges {
			q.Files[i].Ranges[j].Seen *= by
		}
	}
	return q
}

// atMost is the profile counting no more than weight.
func (p *Profile) atMost(weight float64) *Profile {
	if p.Weight <= weight {
		return p
	}
	return p.scaled(weight / p.Weight)
}

// followed is the profile with a start that came after those it was made of. p may be nil.
func (p *Profile) followed(start *Profile) *Profile {
	if p == nil {
		return start.tidy()
	}
	return p.scaled(decay).with(start)
}

// joined is the profile with one from elsewhere, of which nobody knows when its starts were. p may be nil.
func (p *Profile) joined(foreign *Profile) *Profile {
	foreign = foreign.atMost(foreignWeight)
	if p == nil {
		return foreign.tidy()
	}
	return p.with(foreign).atMost(mostWeight)
}

// fileKey names a file whatever image it is in.
type fileKey struct {
	layer digest.Digest
	path  string
}

// with adds the starts of another profile.
func (p *Profile) with(q *Profile) *Profile {
	sum := &Profile{
		Starts: min(p.Starts+q.Starts, maxStarts), Weight: p.Weight + q.Weight, Lost: p.Lost + min(q.Lost, 1<<40), Files: slices.Clone(p.Files),
	}
	at := make(map[fileKey]int, len(p.Files))
	for i, f := range p.Files {
		at[fileKey{f.Layer, f.Path}] = i
	}
	for _, f := range q.Files {
		if i, ok := at[fileKey{f.Layer, f.Path}]; ok {
			sum.Files[i].Ranges = overlay(sum.Files[i].Ranges, f.Ranges)
		} else {
			sum.Files = append(sum.Files, f)
		}
	}
	return sum.tidy()
}

// tidy leaves out what is not worth keeping, joins what touches and is alike, and puts the files in order.
func (p *Profile) tidy() *Profile {
	q := &Profile{Starts: p.Starts, Weight: p.Weight, Lost: p.Lost}
	ranges := 0
	for _, f := range p.Files {
		f.Ranges = slices.DeleteFunc(slices.Clone(f.Ranges), func(r Range) bool { return r.Seen < forgotten*p.Weight })
		if f.Ranges = joinAlike(f.Ranges, p.Weight/200); len(f.Ranges) > 0 {
			q.Files = append(q.Files, f)
			ranges += len(f.Ranges)
		}
	}
	if ranges > maxRanges {
		q = q.only(q.byWorth()[:maxRanges])
	}
	if len(q.Files) > maxFiles { // with some two ranges each: what is left out here is of little worth
		q = q.only(q.byWorth()[:maxFiles])
	}
	slices.SortStableFunc(q.Files, func(a, b File) int { return cmp.Compare(a.first(), b.first()) })
	return q
}

// overlay adds up two lists of ranges, each ascending and apart. What only one has keeps its value; what both have is cut out.
func overlay(a, b []Range) []Range {
	out := make([]Range, 0, len(a)+len(b))
	a, b = slices.Clone(a), slices.Clone(b)
	for len(a) > 0 && len(b) > 0 {
		x, y := &a[0], &b[0]
		switch start, end := max(x.Offset, y.Offset), min(x.end(), y.end()); {
		case x.end() <= y.Offset:
			out, a = append(out, *x), a[1:]
		case y.end() <= x.Offset:
			out, b = append(out, *y), b[1:]
		case x.Offset < start:
			out = append(out, x.cut(start))
		case y.Offset < start:
			out = append(out, y.cut(start))
		default:
			r := x.both(*y)
			r.Length = end - start
			out = append(out, r)
			if x.cut(end); x.Length == 0 {
				a = a[1:]
			}
			if y.cut(end); y.Length == 0 {
				b = b[1:]
			}
		}
	}
	return append(append(out, a...), b...)
}

func (r Range) end() int64 { return r.Offset + r.Length }

// cut takes away what is before at, and returns that.
func (r *Range) cut(at int64) Range {
	before := *r
	before.Length = at - r.Offset
	r.Offset, r.Length = at, r.Length-before.Length
	return before
}

// both is a range that two profiles have. Its place in the order is between theirs, nearer to that of more weight.
func (r Range) both(s Range) Range {
	order := (float64(r.Order)*r.Seen + float64(s.Order)*s.Seen) / (r.Seen + s.Seen)
	return Range{Offset: r.Offset, Order: int(order), Seen: r.Seen + s.Seen, AfterReady: r.AfterReady && s.AfterReady}
}

// joinAlike joins ranges that touch, were needed at about the same time, and by as many starts, give or take slack.
func joinAlike(list []Range, slack float64) []Range {
	var out []Range
	for _, r := range list {
		if n := len(out) - 1; n >= 0 && out[n].end() == r.Offset && out[n].AfterReady == r.AfterReady &&
			max(out[n].Seen-r.Seen, r.Seen-out[n].Seen) <= slack && max(out[n].Order-r.Order, r.Order-out[n].Order) <= nearOrder {
			out[n].Length += r.Length
			out[n].Order = min(out[n].Order, r.Order)
			continue
		}
		out = append(out, r)
	}
	return out
}
