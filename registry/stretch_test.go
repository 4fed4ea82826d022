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

// Two blobs that come side by side count once; a reader that stalls counts neither as fetching nor as starved.
func TestFetchingIsTimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		o.hook = func(http.ResponseWriter, *http.Request, int) bool {
			time.Sleep(time.Second)
			return false
		}
		layers := o.addBlobs(2, 12_000)
		n := newFakeNet()
		defer n.serve(home, o)()
		reg := prometheus.NewRegistry()
		c := newClient(t, n, registry.Config{MaxRangeBytes: 4096, MemoryBytes: 4 * 4096, Registerer: reg})
		defer c.Close()
		var readers []io.ReadCloser
		for _, l := range layers {
			r, err := c.Open(t.Context(), repo, l)
			mustIs(t, err, nil)
			defer r.Close()
			readers = append(readers, r)
		}
		check := func(fetching, starved, bytes float64) {
			t.Helper()
			synctest.Wait()
			for name, want := range map[string]float64{"fetching_seconds": fetching, "starved_seconds": starved, "starved_bytes": bytes} {
				if got := counter(t, reg, "hearth_registry_"+name+"_total", ""); math.Abs(got-want) > 1e-6 {
					t.Errorf("%s: %v, want %v", name, got, want)
				}
			}
		}
		time.Sleep(1500 * time.Millisecond)
		check(1.5, 0, 0) // both first ranges after a second, and then the second ones; nobody reads
		time.Sleep(time.Minute)
		check(2, 0, 0) // all that may be ahead is here
		first := make([]byte, 8192)
		_, err := io.ReadFull(readers[0], first)
		mustIs(t, err, nil)
		check(2, 0, 0) // that was here
		rest, err := io.ReadAll(readers[0])
		mustIs(t, err, nil)
		check(3, 1, float64(len(rest)))
		all, err := io.ReadAll(readers[1])
		mustIs(t, err, nil)
		check(4, 2, float64(len(rest)+len(all)-8192))
		for _, r := range readers {
			r.Close()
		}
		time.Sleep(time.Minute)
		check(4, 2, float64(len(rest)+len(all)-8192))
	})
}
