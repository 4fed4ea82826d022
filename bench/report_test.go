package bench_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/bench"
)

func TestRowsSummariseTheirSamplesByNearestRank(t *testing.T) {
	var r bench.Report
	for i := 100; i >= 1; i-- {
		r.Add("python", "hearth", "pull_time", "s", float64(i))
	}
	row := r.Row("python", "hearth", "pull_time")
	if row == nil {
		t.Fatal("the row is missing")
	}
	got := []float64{float64(row.N), row.Min, row.P50, row.P90, row.P99, row.Max}
	if diff := cmp.Diff([]float64{100, 1, 50, 90, 99, 100}, got); diff != "" {
		t.Errorf("n, min, p50, p90, p99, max (-want +got):\n%s", diff)
	}
	if row.Samples[0] != 100 {
		t.Errorf("samples are not in the order in which they came: %v", row.Samples[:3])
	}
}

func TestReportIsWrittenInTheCommonShape(t *testing.T) {
	r := bench.Report{Suite: "pull", Machine: bench.ThisMachine()}
	r.Add("go", "hearth", "pull_time", "s", 0.5)
	r.Add("go", "containerd", "pull_time", "s", 1)
	file := filepath.Join(t.TempDir(), "report.json")
	if err := r.WriteFile(file); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var shape struct {
		Suite   string
		Machine map[string]any
		Rows    []map[string]any
	}
	if err := json.Unmarshal(data, &shape); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"case", "system", "metric", "unit", "n", "min", "p50", "p90", "p99", "max", "samples"} {
		if _, ok := shape.Rows[0][key]; !ok {
			t.Errorf("rows have no %q: %v", key, shape.Rows[0])
		}
	}
	var table strings.Builder
	if err := r.WriteTable(&table); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(table.String(), "0.50 of containerd") {
		t.Errorf("the table does not compare hearth with its peer:\n%s", table.String())
	}
	if strings.Contains(table.String(), "loses") {
		t.Errorf("the table says that hearth loses, which it does not:\n%s", table.String())
	}
}

func TestLossesAreTold(t *testing.T) {
	r := bench.Report{Suite: "pull"}
	for system, seconds := range map[string]float64{"hearth": 1, "containerd": 2, "soci": 0.8, "containerd-tuned": 0.999} {
		r.Add("python/gzip/loopback", system, "pull_time", "s", seconds)
	}
	var table strings.Builder
	if err := r.WriteTable(&table); err != nil {
		t.Fatal(err)
	}
	_, losses, found := strings.Cut(table.String(), "Where hearth loses:")
	if got := strings.TrimSpace(losses); !found || got != "python/gzip/loopback pull_time: 1.25 of soci" {
		t.Errorf("losses %q in\n%s", got, table.String())
	}
}

func TestTreesThatDifferAreSeen(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a, b} {
		if err := os.WriteFile(filepath.Join(dir, "same"), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("same", filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
	}
	stamp := func(dir string) map[string]string {
		t.Helper()
		tree, err := bench.Tree(dir)
		if err != nil {
			t.Fatal(err)
		}
		return tree
	}
	reference := stamp(a)
	if diff := bench.Differences(reference, stamp(a), 10); len(diff) != 0 {
		t.Errorf("a tree differs from itself: %v", diff)
	}
	for name, change := range map[string]func() error{
		"mode":    func() error { return os.Chmod(filepath.Join(a, "same"), 0o600) },
		"content": func() error { return os.WriteFile(filepath.Join(a, "same"), []byte("y"), 0o600) },
		"link":    func() error { return os.Link(filepath.Join(a, "same"), filepath.Join(a, "hard")) },
		"missing": func() error { return os.Remove(filepath.Join(a, "link")) },
	} {
		before := stamp(a)
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if len(bench.Differences(before, stamp(a), 10)) == 0 {
			t.Errorf("%s: the change was not seen", name)
		}
	}
}
