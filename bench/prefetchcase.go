package bench

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hearth-serverless/hearth/bench/disk"
)

// cachedDisk is the machine's disk, all of whose files that a start reads are in memory.
const cachedDisk = "cached"

// prefetchCase is an image that is started, and the disk that its layers are on.
type prefetchCase struct{ image, disk string }

func (c prefetchCase) String() string { return c.image + "/" + c.disk }

// speed is the name of the case's disk in package disk.
func (c prefetchCase) speed() string {
	if c.disk == cachedDisk {
		return "machine"
	}
	return c.disk
}

// prefetchImages are those that are started: large-java is the largest Java program that Debian packages.
func prefetchImages() []string { return []string{"flask", "python", "node", "java", "large-java"} }

// prefetchDisks are what they are on, in the order in which they are measured.
func prefetchDisks() []string {
	return append(slices.SortedFunc(maps.Keys(disk.Named()), strings.Compare), cachedDisk)
}

// parsePrefetchCase reads IMAGE/DISK.
func parsePrefetchCase(s string) (prefetchCase, error) {
	image, on, _ := strings.Cut(s, "/")
	for _, part := range []struct {
		what, is string
		all      []string
	}{{"IMAGE", image, prefetchImages()}, {"DISK", on, prefetchDisks()}} {
		if !slices.Contains(part.all, part.is) {
			return prefetchCase{}, fmt.Errorf("case %q: want IMAGE/DISK, where %s is one of %s", s, part.what, strings.Join(part.all, ", "))
		}
	}
	return prefetchCase{image, on}, nil
}

// prefetchCases are those that were asked for, or else all, and of a quick run one: disk by disk.
func (o *Options) prefetchCases() (cases []prefetchCase, err error) {
	names := o.Cases
	if len(names) == 0 {
		names = usualPrefetches(o.Quick)
	}
	for _, name := range names {
		c, err := parsePrefetchCase(name)
		if err != nil {
			return nil, err
		}
		cases = append(cases, c)
	}
	slices.SortStableFunc(cases, func(a, b prefetchCase) int {
		return cmp.Or(strings.Compare(a.speed(), b.speed()), slices.Index(prefetchDisks(), a.disk)-slices.Index(prefetchDisks(), b.disk))
	})
	return slices.Compact(cases), nil
}

func usualPrefetches(quick bool) (names []string) {
	if quick {
		return []string{"flask/limited"}
	}
	for _, on := range prefetchDisks() {
		for _, image := range prefetchImages() {
			names = append(names, image+"/"+on)
		}
	}
	return names
}

// Systems of the suite prefetch.
const (
	readsProfile = "hearth"
	readsNothing = "no-prefetch"
	readsWhole   = "whole"
	// needed is no system, but what a start reads when nobody reads anything ahead, the kernel included.
	needed = "needed"
)

// prefetchModes are the systems, as nodeagent's --prefetch knows them.
func prefetchModes() []struct{ system, flag string } {
	return []struct{ system, flag string }{{readsProfile, "profile"}, {readsNothing, "none"}, {readsWhole, "whole"}}
}

// Metrics that prefetching must keep to.
const (
	readyTime      = "ready_time"
	bytesReadAhead = "bytes_read_ahead"
	bytesWasted    = "bytes_wasted"
	bytesFromDisk  = "bytes_from_disk"
)

// prefetchBounds says of what was measured whether it holds.
func (r *Report) prefetchBounds() {
	for _, row := range append([]Row(nil), r.Rows...) {
		c, err := parsePrefetchCase(row.Case)
		if err != nil || row.System != readsProfile {
			continue
		}
		switch row.Metric {
		case readyTime:
			r.prefetchTimes(c, row)
		case bytesWasted:
			if ahead := r.Row(row.Case, readsProfile, bytesReadAhead); ahead != nil && ahead.P50 > 0 {
				r.bound(row.Case, bytesWasted, "of "+bytesReadAhead, row.P50/ahead.P50, 0.2)
			}
		}
	}
}

func (r *Report) prefetchTimes(c prefetchCase, row Row) {
	limits := map[string]float64{"limited": 0.5, "machine": 0.8, cachedDisk: 1.02}
	if none := r.Row(row.Case, readsNothing, readyTime); none != nil && none.P50 > 0 {
		r.bound(row.Case, readyTime, "of "+readsNothing, row.P50/none.P50, limits[c.disk])
	}
	if whole := r.Row(row.Case, readsWhole, readyTime); whole != nil && whole.P50 > 0 && c.disk == "limited" {
		r.bound(row.Case, readyTime, "of "+readsWhole, row.P50/whole.P50, 1)
	}
}
