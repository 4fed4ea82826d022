package bench

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/bench/link"
	"github.com/opencontainers/go-digest"
)

func TestFetching(t *testing.T) {
	metrics := func(bytes, seconds, starvedBytes, starved string) string {
		return "# HELP hearth_registry_fetched_bytes_total Body bytes.\n# TYPE hearth_registry_fetched_bytes_total counter\n" +
			"hearth_registry_fetched_bytes_total " + bytes + "\nhearth_registry_fetching_seconds_total " + seconds +
			"\nhearth_registry_starved_bytes_total " + starvedBytes + "\nhearth_registry_starved_seconds_total " + starved + "\nother{label=\"a b\"} 3\n"
	}
	before, err := parseFetching(strings.NewReader(metrics("1e+06", "0.5", "0", "0")))
	if err != nil {
		t.Fatal(err)
	}
	after, err := parseFetching(strings.NewReader(metrics("1.01e+08", "2.5", "25e6", "0.25")))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	addFetching(before, after, link.Named()["capped"], func(metric, unit string, sample float64) { got[metric+" "+unit] = sample })
	want := map[string]float64{"fetch_time s": 2, "fetch_rate MB/s": 50, "link_wait s": 0.25, "link_used %": 80}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	clear(got)
	addFetching(before, before, link.Speed{}, func(metric, _ string, sample float64) { got[metric] = sample })
	if len(got) != 0 {
		t.Errorf("of no fetching: %v", got)
	}
	for _, bad := range []string{"", metrics("many", "1", "1", "1"), "hearth_registry_fetched_bytes_total 1\n"} {
		if _, err := parseFetching(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestFetchAlone(t *testing.T) {
	data := make([]byte, 9<<20)
	var broken atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2/lib/app/blobs/{digest}", func(w http.ResponseWriter, r *http.Request) {
		if broken.Load() {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	})
	server := httptest.NewServer(mux)
	defer server.Close()
	layers := []images.Layer{
		{Digest: digest.FromString("1").String(), Bytes: int64(len(data))}, {Digest: digest.FromString("2").String(), Bytes: int64(len(data))},
	}
	for name, fetch := range map[string]func(context.Context, string, string, []images.Layer) (time.Duration, error){
		onlyFetch: fetchOnly, hearthFetch: fetchByClient,
	} {
		broken.Store(false)
		if _, err := fetch(t.Context(), server.Listener.Addr().String(), "lib/app", layers); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		broken.Store(true)
		if _, err := fetch(t.Context(), server.Listener.Addr().String(), "lib/app", layers); err == nil {
			t.Errorf("%s: layers that are not there were fetched", name)
		}
	}
}
