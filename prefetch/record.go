package prefetch

import (
	"slices"

	"github.com/hearth-serverless/hearth/prefetch/trace"
)

// fileID names a file on this machine.
type fileID struct{ device, inode uint64 }

// wanted are the files of a trace, each once.
func wanted(t trace.Trace) map[fileID]bool {
	ids := map[fileID]bool{}
	for _, a := range t.Accesses {
		ids[fileID{a.Device, a.Inode}] = true
	}
	return ids
}

// profileOf makes a start's profile of its trace. What is in no layer, and so not in places, is left out. It is nil if nothing is left.
func profileOf(t trace.Trace, places map[fileID]fileKey) *Profile {
	p := &Profile{Starts: 1, Weight: 1, Lost: t.Lost}
	at := map[fileKey]int{}
	for order, a := range t.Accesses {
		key, ok := places[fileID{a.Device, a.Inode}]
		if !ok || a.Length <= 0 || a.Offset < 0 || a.Offset > maxOffset || a.Length > maxOffset-a.Offset {
			continue
		}
		i, ok := at[key]
		if !ok {
			i = len(p.Files)
			at[key] = i
			p.Files = append(p.Files, File{Layer: key.layer, Path: key.path})
		}
		start := a.Offset / blockBytes * blockBytes
		end := (a.Offset + a.Length + blockBytes - 1) / blockBytes * blockBytes
		p.Files[i].Ranges = cover(p.Files[i].Ranges, Range{
			Offset: start, Length: end - start, Order: min(order, maxOrder), Seen: 1, AfterReady: a.Ready,
		})
	}
	if p = p.tidy(); len(p.Files) == 0 {
		return nil
	}
	return p
}

// cover adds what of r is not there yet to a list that is ascending and apart.
func cover(list []Range, r Range) []Range {
	i, _ := slices.BinarySearchFunc(list, r.Offset, func(s Range, at int64) int { // the first that ends after r begins
		if s.end() <= at {
			return -1
		}
		return 1
	})
	var add []Range
	first := i
	for ; i < len(list) && list[i].Offset < r.end(); i++ {
		if r.Offset < list[i].Offset {
			add = append(add, r.cut(list[i].Offset))
		}
		add = append(add, list[i])
		if list[i].end() >= r.end() {
			return slices.Replace(list, first, i+1, add...)
		}
		r.cut(list[i].end())
	}
	return slices.Replace(list, first, i, append(add, r)...)
}

// withKnown adds to a start's profile what is known, as if the start had needed it: for a tracer that does not see what is found in
// memory, and so cannot tell what was not needed.
func (p *Profile) withKnown(known *Profile) *Profile {
	if known == nil {
		return p
	}
	sum := p.clone()
	at := map[fileKey]int{}
	for i, f := range sum.Files {
		at[fileKey{f.Layer, f.Path}] = i
	}
	for _, f := range known.Files {
		i, ok := at[fileKey{f.Layer, f.Path}]
		if !ok {
			i = len(sum.Files)
			sum.Files = append(sum.Files, File{Layer: f.Layer, Path: f.Path})
		}
		for _, r := range f.Ranges {
			r.Seen = p.Weight
			sum.Files[i].Ranges = cover(sum.Files[i].Ranges, r)
		}
	}
	return sum
}
