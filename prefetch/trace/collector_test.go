package trace_test

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/hearth-serverless/hearth/prefetch/trace"
)

const device = 0xfd01

func TestPagesAreOrderedByFirstNeed(t *testing.T) {
	type add struct{ inode, first, pages uint64 }
	access := func(inode, first, pages uint64, ready bool) trace.Access {
		return trace.Access{Device: device, Inode: inode, Offset: int64(first) * page, Length: int64(pages) * page, Ready: ready}
	}
	for _, c := range []struct {
		name  string
		first []add // before it is ready
		then  []add // after
		want  []trace.Access
	}{
		{"nothing", nil, nil, nil},
		{"in order", []add{{1, 5, 1}, {2, 0, 3}, {1, 0, 2}}, nil,
			[]trace.Access{access(1, 5, 1, false), access(2, 0, 3, false), access(1, 0, 2, false)}},
		{"goes on", []add{{1, 60, 4}, {1, 64, 100}, {1, 164, 1}}, nil, []trace.Access{access(1, 60, 105, false)}},
		{"again", []add{{1, 0, 10}, {1, 3, 4}, {1, 0, 10}}, nil, []trace.Access{access(1, 0, 10, false)}},
		{"around", []add{{1, 3, 2}, {1, 0, 10}}, nil,
			[]trace.Access{access(1, 3, 2, false), access(1, 0, 3, false), access(1, 5, 5, false)}},
		{"ready", []add{{1, 0, 4}}, []add{{1, 2, 4}, {1, 6, 1}}, []trace.Access{access(1, 0, 4, false), access(1, 4, 3, true)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := trace.NewCollector(device)
			for _, a := range c.first {
				x.Add(device, a.inode, a.first, a.pages, 0)
			}
			ready := x.Ready()
			for _, a := range c.then {
				x.Add(device, a.inode, a.first, a.pages, ready)
			}
			x.Add(device+1, 1, 50, 1, ready) // nobody asked for that device
			x.Add(device, 1, 0, 1, ready-1)  // what happened before, told late
			want := c.want
			if !slices.ContainsFunc(append(c.first, c.then...), func(a add) bool { return a.inode == 1 && a.first == 0 }) {
				want = append(want, access(1, 0, 1, false))
			}
			if got, lost := x.Result(); !slices.Equal(got, want) || lost != 0 {
				t.Errorf("got %+v, lost %d, want %+v", got, lost, want)
			}
		})
	}
}

// TestMillionRandomEvents holds a collector to its bounds against events that no kernel makes.
func TestMillionRandomEvents(t *testing.T) {
	for name, event := range map[string]func(r *rand.Rand) (inode, first, pages uint64){
		"any": func(r *rand.Rand) (uint64, uint64, uint64) { return r.Uint64(), r.Uint64(), r.Uint64() },
		"one page of any file": func(r *rand.Rand) (uint64, uint64, uint64) {
			return r.Uint64(), r.Uint64N(1 << 50), 1
		},
		"pages of one file, with holes": func(r *rand.Rand) (uint64, uint64, uint64) {
			return 1, 2 * r.Uint64N(1<<30), 1
		},
		"a small file": func(r *rand.Rand) (uint64, uint64, uint64) { return 1, r.Uint64N(100), 1 + r.Uint64N(30) },
		"at the end":   func(r *rand.Rand) (uint64, uint64, uint64) { return 1, 1<<50 - r.Uint64N(64), r.Uint64N(128) },
	} {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			x := trace.NewCollector(device)
			const events = 1_000_000
			for range events {
				inode, first, pages := event(r)
				x.Add(device, inode, first, pages, 0)
			}
			got, lost := x.Result()
			if len(got) > trace.MaxAccesses || x.Words() > trace.MaxWords || lost > events {
				t.Errorf("%d accesses, %d words, %d lost", len(got), x.Words(), lost)
			}
			if len(got) == trace.MaxAccesses && lost == 0 {
				t.Error("what there was no room for was not counted")
			}
			for _, a := range got {
				if a.Offset < 0 || a.Length <= 0 || a.Offset+a.Length < a.Offset {
					t.Fatalf("access %+v", a)
				}
			}
		})
	}
}

// FuzzCollector compares with a plain map of pages.
func FuzzCollector(f *testing.F) {
	f.Add([]byte{1, 0, 0, 5, 0, 1, 3, 0, 9, 0, 2, 62, 0, 70, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		x := trace.NewCollector(device)
		type at struct{ inode, page uint64 }
		want := map[at]bool{}
		for ; len(b) >= 5; b = b[5:] {
			inode, first := uint64(b[0]), uint64(binary.LittleEndian.Uint16(b[1:]))
			pages := uint64(binary.LittleEndian.Uint16(b[3:]) % 512)
			x.Add(device, inode, first, pages, 0)
			for i := range pages {
				want[at{inode, first + i}] = true
			}
			if len(want) > 1<<16 {
				break
			}
		}
		got, _ := x.Result()
		n := 0
		for _, a := range got {
			for i := a.Offset / page; i < (a.Offset+a.Length)/page; i++ {
				n++
				if !want[at{a.Inode, uint64(i)}] {
					t.Fatalf("page %d of %d was never added", i, a.Inode)
				}
			}
		}
		if n != len(want) {
			t.Fatalf("%d pages, want %d", n, len(want))
		}
	})
}
