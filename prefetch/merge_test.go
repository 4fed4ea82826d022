package prefetch_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/prefetch"
)

func ranges(p *prefetch.Profile, path string) []prefetch.Range {
	for _, f := range p.Files {
		if f.Path == path {
			return f.Ranges
		}
	}
	return nil
}

func TestFollowed(t *testing.T) {
	first := &prefetch.Profile{Starts: 1, Weight: 1, Lost: 1, Files: []prefetch.File{
		{Layer: base, Path: "a", Ranges: []prefetch.Range{{Offset: 0, Length: 16384, Order: 10, Seen: 1, AfterReady: true}}},
		{Layer: base, Path: "once", Ranges: []prefetch.Range{{Length: 4096, Order: 2, Seen: 1}}},
	}}
	second := &prefetch.Profile{Starts: 1, Weight: 1, Lost: 2, Files: []prefetch.File{
		{Layer: base, Path: "a", Ranges: []prefetch.Range{{Offset: 8192, Length: 16384, Order: 1, Seen: 1}}},
		{Layer: app, Path: "once", Ranges: []prefetch.Range{{Length: 4096, Order: 0, Seen: 1}}},
	}}
	want := &prefetch.Profile{Starts: 2, Weight: 1.8, Lost: 3, Files: []prefetch.File{
		{Layer: app, Path: "once", Ranges: []prefetch.Range{{Length: 4096, Order: 0, Seen: 1}}},
		{Layer: base, Path: "a", Ranges: []prefetch.Range{
			{Offset: 0, Length: 8192, Order: 10, Seen: 0.8, AfterReady: true},
			{Offset: 8192, Length: 8192, Order: 5, Seen: 1.8},
			{Offset: 16384, Length: 8192, Order: 1, Seen: 1},
		}},
		{Layer: base, Path: "once", Ranges: []prefetch.Range{{Length: 4096, Order: 2, Seen: 0.8}}},
	}}
	got := first.Followed(second)
	if diff := cmp.Diff(want, got, nearly); diff != "" {
		t.Error(diff)
	}
	if first.Weight != 1 || first.Files[0].Ranges[0].Seen != 1 {
		t.Error("what was merged has changed")
	}
}

// randomStart needs the same of a start each time, and some more at random.
func randomStart(random *rand.Rand) *prefetch.Profile {
	p := &prefetch.Profile{Starts: 1, Weight: 1}
	for i := range 40 {
		f := prefetch.File{Layer: base, Path: fmt.Sprint("always-", i)}
		at := int64(0)
		for j := range int64(5) {
			f.Ranges = append(f.Ranges, prefetch.Range{Offset: at, Length: (1 + j) * 4096, Order: 10*i + int(j), Seen: 1})
			at += (3 + 2*j) * 8192
		}
		p.Files = append(p.Files, f)
		if random.IntN(3) == 0 { // by chance: the kernel's own read-ahead, for example
			p.Files = append(p.Files, prefetch.File{Layer: base, Path: fmt.Sprintf("chance-%d-%d", i, random.IntN(20)), Ranges: []prefetch.Range{
				{Offset: random.Int64N(100) * 4096, Length: 65536, Order: 10*i + 9, Seen: 1},
			}})
		}
	}
	return p
}

// blocks are the parts of a profile, with how much of its weight they were seen in.
func blocks(p *prefetch.Profile) map[string]float64 {
	all := map[string]float64{}
	for _, f := range p.Files {
		for _, r := range f.Ranges {
			for at := r.Offset; at < r.Offset+r.Length; at += 4096 {
				all[fmt.Sprint(f.Layer, f.Path, at)] = r.Seen / p.Weight
			}
		}
	}
	return all
}

func TestFollowedProperties(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	p := randomStart(random)
	for range 50 {
		before, start := blocks(p), randomStart(random)
		p = p.Followed(start)
		if err := p.Check(); err != nil {
			t.Fatal(err)
		}
		if p.Weight > 5 {
			t.Fatalf("%d starts count as %v", p.Starts, p.Weight)
		}
		after, needed := blocks(p), blocks(start)
		for b, seen := range after {
			_, again := needed[b]
			switch {
			case again && seen < before[b]-0.001, !again && seen > before[b]+0.001:
				t.Fatalf("%s: was seen in %v of starts, needed again %v, then in %v", b, before[b], again, seen)
			case before[b] > 0.999 && again && seen < 0.999:
				t.Fatalf("%s: was always needed, and counts %v", b, seen)
			}
		}
		for b := range needed {
			if after[b] == 0 {
				t.Fatalf("%s was needed and is not known", b)
			}
		}
	}
	for range 20 { // what is not needed any more is forgotten
		p = p.Followed(&prefetch.Profile{Starts: 1, Weight: 1, Files: randomStart(random).Files[:1]})
	}
	if ranges(p, "always-30") != nil || ranges(p, "always-0") == nil {
		t.Errorf("%d files are known", len(p.Files))
	}
}

// TestShare: a part is never more than the whole, nor less than nothing, whatever was rounded.
func TestShare(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 100_000 {
		all := 1 + random.Int64N(1<<40)
		n, both := random.Int64N(all+1), random.Int64N(all+1)
		if got := prefetch.Share(n, both, all); got < 0 || got > n {
			t.Fatalf("%d of %d is %d of %d", both, all, got, n)
		}
	}
	for want, of := range map[int64][3]int64{0: {4096, 0, 8192}, 2048: {4096, 4096, 8192}, 4096: {4096, 8192, 8192}} {
		if got := prefetch.Share(of[0], of[1], of[2]); got != want {
			t.Errorf("share of %v is %d, want %d", of, got, want)
		}
	}
	if got := prefetch.Share(0, 0, 0); got != 0 {
		t.Errorf("a part of nothing is %d", got)
	}
}

// TestWaste: of what is read ahead after three starts, the next ones need 80 % and more, and lack next to nothing.
func TestWaste(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	p := randomStart(random)
	for range 2 {
		p = p.Followed(randomStart(random))
	}
	for range 20 {
		needed := blocks(randomStart(random))
		read, used := int64(0), int64(0)
		for _, r := range p.Plan() {
			for at := r.Offset; at < r.Offset+r.Length; at += 4096 {
				read++
				if needed[fmt.Sprint(base, r.Path, at)] > 0 {
					used++
				}
			}
		}
		always := int64(40 * (1 + 2 + 3 + 4 + 5))
		if float64(used) < 0.8*float64(read) || used < always {
			t.Fatalf("of %d blocks that were read, %d were needed; %d always are", read, used, always)
		}
	}
}

func TestJoined(t *testing.T) {
	foreign := &prefetch.Profile{Starts: 900_000, Weight: 5, Files: []prefetch.File{
		{Layer: base, Path: "foreign", Ranges: []prefetch.Range{{Length: 4096, Order: 1, Seen: 5}}},
		{Layer: base, Path: "half", Ranges: []prefetch.Range{{Length: 4096, Order: 2, Seen: 2.5}}},
	}}
	p := foreign.Joined(foreign)
	for range 100 { // the same again and again, by whoever
		p = p.Joined(foreign)
	}
	if p.Weight > 5.01 || p.Starts != 1_000_000 || p.Check() != nil {
		t.Errorf("%d starts count as %v, %v", p.Starts, p.Weight, p.Check())
	}
	if r := ranges(p, "half"); len(r) != 1 || math.Abs(r[0].Seen/p.Weight-0.5) > 0.01 {
		t.Errorf("half of the starts become %v of %v", r, p.Weight)
	}
	own := (*prefetch.Profile)(nil).Joined(foreign)
	for range 3 {
		own = own.Followed(&prefetch.Profile{Starts: 1, Weight: 1, Files: []prefetch.File{
			{Layer: base, Path: "own", Ranges: []prefetch.Range{{Length: 4096, Seen: 1}}},
		}})
	}
	if diff := cmp.Diff([]prefetch.Planned{{Path: "own", Length: 4096}}, own.Plan()); diff != "" {
		t.Errorf("three starts of our own do not outweigh it: %s", diff)
	}
}

func TestPlan(t *testing.T) {
	const mib = 1 << 20
	p := &prefetch.Profile{Starts: 3, Weight: 2, Files: []prefetch.File{
		{Layer: base, Path: "a", Ranges: []prefetch.Range{
			{Offset: 0, Length: mib / 2, Order: 5, Seen: 2}, {Offset: mib/2 + 8192, Length: mib / 4, Order: 1, Seen: 2}, // nearly one
			{Offset: 3 * mib, Length: mib, Order: 9, Seen: 2}, {Offset: 5 * mib, Length: 4096, Order: 0, Seen: 2, AfterReady: true},
			{Offset: 6 * mib, Length: mib, Order: 0, Seen: 0.9},
		}},
		{Layer: base, Path: "b", Ranges: []prefetch.Range{{Offset: 0, Length: mib, Order: 3, Seen: 1}}},
	}}
	want := []prefetch.Planned{
		{Path: "a", Offset: mib/2 + 8192, Length: mib / 4}, {Path: "b", Length: mib}, // the first MiB of need
		{Path: "a", Offset: 0, Length: mib / 2}, {Path: "a", Offset: 3 * mib, Length: mib}, {Path: "a", Offset: 5 * mib, Length: 4096},
	}
	if diff := cmp.Diff(want, p.Plan()); diff != "" {
		t.Error(diff)
	}
	p.Files = p.Files[:1]
	p.Files[0].Ranges = p.Files[0].Ranges[:2]
	if diff := cmp.Diff([]prefetch.Planned{{Path: "a", Length: mib*3/4 + 8192}}, p.Plan()); diff != "" {
		t.Error(diff)
	}
}
