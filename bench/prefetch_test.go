package bench

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPrefetchCases(t *testing.T) {
	for name, wrong := range map[string]string{
		"python/limited": "", "java/machine": "", "large-java/cached": "",
		"go/limited": "IMAGE is one of", "python/floppy": "DISK is one of", "python": "DISK is one of", "": "IMAGE is one of", "python/limited/1": "DISK is one of",
	} {
		c, err := parsePrefetchCase(name)
		if wrong == "" && (err != nil || c.String() != name) {
			t.Errorf("%s is read as %s, %v", name, c, err)
		}
		if wrong != "" && (err == nil || !strings.Contains(err.Error(), wrong)) {
			t.Errorf("%q: %v, want an error that says %q", name, err, wrong)
		}
	}
}

// Cases of one disk follow one another, and those that have all in memory come last.
func TestPrefetchOrder(t *testing.T) {
	o := Options{Cases: []string{"node/cached", "java/machine", "java/limited", "flask/cached", "node/limited", "java/machine"}}
	cases, err := o.prefetchCases()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range cases {
		got = append(got, c.String())
	}
	want := []string{"java/limited", "node/limited", "java/machine", "node/cached", "flask/cached"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("cases (-want +got):\n%s", diff)
	}
	for _, quick := range []bool{false, true} {
		o := Options{Quick: quick}
		if cases, err := o.prefetchCases(); err != nil || len(cases) != len(usualPrefetches(quick)) {
			t.Errorf("quick %v: %d cases, %v", quick, len(cases), err)
		}
	}
}

func TestPrefetchBounds(t *testing.T) {
	r := &Report{}
	add := func(testCase, system, metric string, sample float64) { r.Add(testCase, system, metric, "", sample) }
	add("python/limited", "hearth", readyTime, 1)
	add("python/limited", "no-prefetch", readyTime, 3)
	add("python/limited", "whole", readyTime, 0.9)
	add("python/machine", "hearth", readyTime, 1)
	add("python/machine", "no-prefetch", readyTime, 1.1)
	add("python/machine", "whole", readyTime, 0.5)
	add("python/cached", "hearth", readyTime, 1)
	add("python/cached", "no-prefetch", readyTime, 1)
	add("python/limited", "hearth", bytesReadAhead, 100)
	add("python/limited", "hearth", bytesWasted, 10)
	add("python/machine", "hearth", bytesReadAhead, 100)
	add("python/machine", "hearth", bytesWasted, 30)
	add("python/cached", "hearth", bytesReadAhead, 0)
	add("python/cached", "hearth", bytesWasted, 0)
	r.prefetchBounds()
	want := []string{
		"holds   python/limited ready_time: 0.33 of no-prefetch, at most 0.50",
		"BROKEN  python/limited ready_time: 1.11 of whole, at most 1.00",
		"BROKEN  python/machine ready_time: 0.91 of no-prefetch, at most 0.80",
		"holds   python/cached ready_time: 1.00 of no-prefetch, at most 1.02",
		"holds   python/limited bytes_wasted: 0.10 of bytes_read_ahead, at most 0.20",
		"BROKEN  python/machine bytes_wasted: 0.30 of bytes_read_ahead, at most 0.20",
	}
	if diff := cmp.Diff(want, r.boundLines()); diff != "" {
		t.Errorf("bounds (-want +got):\n%s", diff)
	}
}

func TestPrefetchCounts(t *testing.T) {
	got, err := parsePrefetchCounts(strings.NewReader(`# HELP hearth_prefetch_ahead_bytes_total Bytes.
hearth_prefetch_ahead_bytes_total 1.5e+06
hearth_prefetch_recordings_total{outcome="learned"} 3
hearth_prefetch_recordings_total{outcome="start"} 4
`))
	if want := (prefetchCounts{ahead: 1.5e6, recorded: 3}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	if _, err := parsePrefetchCounts(strings.NewReader("hearth_prefetch_ahead_bytes_total many\n")); err == nil {
		t.Error("read a number that is none")
	}
}

// Knobs are as before afterwards, also where one cannot be set.
func TestKnobs(t *testing.T) {
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	for file, value := range map[string]string{one: "128\n", two: "8192\n"} {
		if err := os.WriteFile(file, []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, files := range [][]string{{one, filepath.Join(dir, "gone"), two}, {one, dir, two}} {
		restore, err := setKnobs(files, "0")
		if bad := files[1] == dir; (err != nil) != bad {
			t.Errorf("set %q: %v", files, err)
		}
		if set, _ := os.ReadFile(one); string(set) != "0" {
			t.Errorf("%s is %q, want 0", one, set)
		}
		if err := restore(); err != nil {
			t.Error(err)
		}
		for file, want := range map[string]string{one: "128\n", two: "8192\n"} {
			if value, _ := os.ReadFile(file); string(value) != want {
				t.Errorf("%s is %q, was %q", file, value, want)
			}
		}
	}
}
