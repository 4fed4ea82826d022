package prefetch

import (
	"cmp"
	"slices"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

const (
	// enough is the part of an image's starts that have needed a range for it to be read ahead.
	enough = 0.5
	// gapShare is how much may be read of what nobody needed, so that less is asked for at once, as a part of what is needed.
	gapShare = 0.05
	// mostGap is the longest gap that is read over.
	mostGap = 64 << 10
	// firstWindow is how much is read in strict order of need, file by file; later windows are twice as long each, up to lastWindow:
	// what is needed late may come in an order that suits the disk.
	firstWindow, lastWindow = 1 << 20, 32 << 20
)

// step is what is read of a file at once.
type step struct {
	layer  digest.Digest
	path   string
	ranges []span
}

// span is part of a file, in bytes.
type span struct{ offset, length int64 }

func (s span) end() int64 { return s.offset + s.length }

// wantedRange is a range that is to be read, with its file.
type wantedRange struct {
	file int
	Range
}

// plan says what of a profile is read ahead, in which order. Of an image with a single start that is everything; with more, what
// half of them have needed.
func (p *Profile) plan() []step {
	var all []wantedRange
	var sum int64
	for i, f := range p.Files {
		for _, r := range f.Ranges {
			if p.Starts == 1 || r.Seen >= enough*p.Weight*0.99 { // it is rounded
				all = append(all, wantedRange{i, r})
				sum += r.Length
			}
		}
	}
	gap := p.gap(all, int64(gapShare*float64(sum)))
	slices.SortStableFunc(all, func(a, b wantedRange) int {
		return cmp.Or(compareBool(a.AfterReady, b.AfterReady), cmp.Compare(a.Order, b.Order), cmp.Compare(a.file, b.file))
	})
	var steps []step
	for window := int64(firstWindow); len(all) > 0; window = min(2*window, lastWindow) {
		n, size := 0, int64(0)
		for n < len(all) && size < window {
			size += all[n].Length
			n++
		}
		steps = append(steps, p.group(all[:n], gap)...)
		all = all[n:]
	}
	return steps
}

// gap is the longest gap between ranges of a file, of those that are to be read, that can be read over within a budget.
func (p *Profile) gap(all []wantedRange, budget int64) int64 {
	var gaps []int64
	for i := 1; i < len(all); i++ { // they are by file and ascending still
		if all[i].file == all[i-1].file {
			if g := all[i].Offset - all[i-1].end(); g > 0 && g <= mostGap {
				gaps = append(gaps, g)
			}
		}
	}
	slices.Sort(gaps)
	longest := int64(0)
	for i, g := range gaps {
		if budget -= g; budget < 0 {
			break
		}
		if i+1 == len(gaps) || gaps[i+1] > g { // only with all of its length
			longest = g
		}
	}
	return longest
}

// group makes steps of ranges, one a file, in the order in which they come.
func (p *Profile) group(list []wantedRange, gap int64) []step {
	at := map[int]int{}
	var steps []step
	for _, r := range list {
		i, ok := at[r.file]
		if !ok {
			i = len(steps)
			at[r.file] = i
			steps = append(steps, step{layer: p.Files[r.file].Layer, path: p.Files[r.file].Path})
		}
		steps[i].ranges = append(steps[i].ranges, span{r.Offset, r.Length})
	}
	for i := range steps {
		steps[i].ranges = joinNear(steps[i].ranges, gap)
	}
	return steps
}

// joinNear sorts spans and joins those that are no further apart than gap.
func joinNear(list []span, gap int64) []span {
	slices.SortFunc(list, func(a, b span) int { return cmp.Compare(a.offset, b.offset) })
	out := list[:0]
	for _, s := range list {
		if n := len(out) - 1; n >= 0 && s.offset-out[n].end() <= gap {
			out[n].length = max(out[n].end(), s.end()) - out[n].offset
			continue
		}
		out = append(out, s)
	}
	return out
}

// bytesOf is how much steps read.
func bytesOf(steps []step) int64 {
	var n int64
	for _, s := range steps {
		for _, part := range s.ranges {
			n += part.length
		}
	}
	return n
}

// inTurn gives each step once, to whoever asks first.
func inTurn(steps []step) func() (step, bool) {
	var at atomic.Int64
	return func() (step, bool) {
		n := at.Add(1) - 1
		if n >= int64(len(steps)) {
			return step{}, false
		}
		return steps[n], true
	}
}
