package registry_test

import (
	"io"
	"math"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-serverless/hearth/registry"
)

// Two blobs that come side by side count once, and a reader that stalls does not count as fetching.
func TestFetchingIsTimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		o.hook = func(http.ResponseWriter, *http.Request, int) bool {
			time.Sleep(time.Second)
			return false
		}
		n := newFakeNet()
		defer n.serve(home, o)()
		reg := prometheus.NewRegistry()
		c := newClient(t, n, registry.Config{MaxRangeBytes: 4096, MemoryBytes: 4 * 4096, Registerer: reg})
		defer c.Close()
		var readers []io.ReadCloser
		for i := range 2 {
			l, _ := o.addBlob(12_000 + i)
			r, err := c.Open(t.Context(), repo, l)
			mustIs(t, err, nil)
			defer r.Close()
			readers = append(readers, r)
		}
		check := func(fetching, reading float64) {
			t.Helper()
			synctest.Wait()
			if got := counter(t, reg, "hearth_registry_fetching_seconds_total", ""); math.Abs(got-fetching) > 1e-6 {
				t.Errorf("%v s of fetching, want %v", got, fetching)
			}
			if got := counter(t, reg, "hearth_registry_reading_seconds_total", ""); math.Abs(got-reading) > 1e-6 {
				t.Errorf("%v s of reading, want %v", got, reading)
			}
		}
		time.Sleep(1500 * time.Millisecond)
		check(1.5, 1.5) // both first ranges after a second, and then the second ones
		time.Sleep(time.Minute)
		check(2, 61.5) // all that may be ahead is here
		for _, r := range readers {
			_, err := io.ReadAll(r)
			mustIs(t, err, nil)
			r.Close()
		}
		before := counter(t, reg, "hearth_registry_fetching_seconds_total", "")
		if before < 3 || before > 5 {
			t.Errorf("%v s of fetching in the end", before)
		}
		time.Sleep(time.Minute)
		check(before, before-2+61.5)
	})
}
