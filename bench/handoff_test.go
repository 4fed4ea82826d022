package bench

import (
	"strings"
	"testing"
)

func TestHandoffCases(t *testing.T) {
	for name, wrong := range map[string]string{
		"python/runtime/1": "", "java/revision/10": "", "image/sandbox/50": "", "image/revision/100": "",
		"python/sandbox/1":   "DEGREE is one of runtime, revision",
		"image/runtime/1":    "DEGREE is one of sandbox, revision",
		"perl/runtime/1":     "RUNTIME is one of",
		"python/runtime":     "N is 1 to 100",
		"python/runtime/0":   "N is 1 to 100",
		"python/runtime/101": "N is 1 to 100",
		"python/runtime/1/2": "N is 1 to 100",
		"":                   "RUNTIME is one of",
	} {
		c, err := parseHandoffCase(name)
		if wrong == "" && (err != nil || c.String() != name) {
			t.Errorf("%s is read as %s, %v", name, c, err)
		}
		if wrong != "" && (err == nil || !strings.Contains(err.Error(), wrong)) {
			t.Errorf("%q: %v, want an error that says %q", name, err, wrong)
		}
	}
}

func TestUsualHandoffsAreCases(t *testing.T) {
	for _, quick := range []bool{false, true} {
		o := Options{Quick: quick}
		cases, err := o.handoffCases()
		if err != nil || len(cases) != len(usualHandoffs(quick)) {
			t.Errorf("quick %v: %d cases, %v", quick, len(cases), err)
		}
		for i := 1; i < len(cases); i++ {
			if cases[i].n < cases[i-1].n {
				t.Errorf("%s comes after %s, which starts more at once", cases[i], cases[i-1])
			}
		}
	}
}

func TestHandoffBounds(t *testing.T) {
	r := &Report{}
	add := func(testCase, system string, samples ...float64) {
		for _, s := range samples {
			r.Add(testCase, system, lastByte, "ms", s)
		}
	}
	add("python/revision/1", "hearth", 4, 4, 30)
	add("python/revision/1", "cri", 50)
	add("node/runtime/1", "hearth", 100)
	add("node/runtime/1", "cri", 400)
	add("python/revision/50", "hearth", 41)
	add("image/sandbox/1", "hearth", 60)
	add("image/sandbox/1", "process", 10)
	r.Add("python/revision/1", "hearth", "phase_thaw", "ms", 99)
	r.handoffBounds()
	got := map[string]bool{}
	for _, b := range r.Bounds {
		got[b.Case+" "+b.What] = b.Holds
	}
	want := map[string]bool{
		"python/revision/1 p50": true, "python/revision/1 p99": false, "python/revision/1 p50 below that of a plain pod": true,
		"node/runtime/1 p50": false, "node/runtime/1 p99": false, "node/runtime/1 p50 below that of a plain pod": false,
		"python/revision/50 p99, of 10 times the p50 of python/revision/1": false,
		"image/sandbox/1 p50 above that of the bare process":               true,
	}
	for what, holds := range want {
		if seen, ok := got[what]; !ok || seen != holds {
			t.Errorf("%s: judged %v, holds %v, want %v", what, ok, seen, holds)
		}
	}
	if len(got) != len(want) {
		t.Errorf("bounds: %v", r.boundLines())
	}
	var table strings.Builder
	if err := r.WriteTable(&table); err != nil || !strings.Contains(table.String(), "BROKEN  node/runtime/1 p50: 100 ms, at most 20.0") {
		t.Errorf("the table does not tell what is broken: %v\n%s", err, table.String())
	}
}
