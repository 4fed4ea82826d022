package bench

import (
	"strings"
	"testing"

	"github.com/hearth-serverless/hearth/bench/link"
)

func TestFetching(t *testing.T) {
	metrics := func(bytes, seconds string) string {
		return "# HELP hearth_registry_fetched_bytes_total Body bytes.\n# TYPE hearth_registry_fetched_bytes_total counter\n" +
			"hearth_registry_fetched_bytes_total " + bytes + "\nhearth_registry_fetching_seconds_total " + seconds + "\nother{label=\"a b\"} 3\n"
	}
	before, err := parseFetching(strings.NewReader(metrics("1e+06", "0.5")))
	if err != nil {
		t.Fatal(err)
	}
	after, err := parseFetching(strings.NewReader(metrics("1.01e+08", "1.5")))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	addFetching(before, after, link.Named()["capped"], func(metric, unit string, sample float64) { got[metric+" "+unit] = sample })
	if len(got) != 3 || got["fetch_time s"] != 1 || got["fetch_rate MB/s"] != 100 || got["link_used %"] != 80 {
		t.Errorf("got %v", got)
	}
	clear(got)
	addFetching(before, before, link.Speed{}, func(metric, _ string, sample float64) { got[metric] = sample })
	if len(got) != 0 {
		t.Errorf("of no fetching: %v", got)
	}
	for _, bad := range []string{"", metrics("many", "1"), "hearth_registry_fetched_bytes_total 1\n"} {
		if _, err := parseFetching(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
