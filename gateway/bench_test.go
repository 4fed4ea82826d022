package gateway_test

import (
	"io"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// BenchmarkProxy compares a warm request through the gateway with one straight to the Instance. The gateway may add 1 ms
// at p50 and 3 ms at p99:
//
//	go test ./gateway -run '^$' -bench Proxy -benchtime 20000x
func BenchmarkProxy(b *testing.B) {
	w := newWorld(b, loopback{b}, nil)
	in, _ := w.instance(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) }))
	w.deploy("f", nil, 0, in)
	direct := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
	defer direct.CloseIdleConnections()
	for _, clients := range []int{1, 8} {
		name := map[int]string{1: "one", 8: "eight"}[clients]
		b.Run("direct/"+name, func(b *testing.B) { measure(b, clients, direct, "http://"+in.GetAddress()+"/") })
		b.Run("gateway/"+name, func(b *testing.B) { measure(b, clients, w.client, "http://gateway/fn/f") })
	}
}

func measure(b *testing.B, clients int, c *http.Client, url string) {
	took := make([][]time.Duration, clients)
	var all sync.WaitGroup
	b.ReportAllocs()
	for i := range clients {
		all.Go(func() {
			for range max(1, b.N/clients) {
				begun := time.Now()
				res, err := c.Get(url)
				if err != nil || res.StatusCode != 200 {
					b.Errorf("%v %v", res, err)
					return
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
				took[i] = append(took[i], time.Since(begun))
			}
		})
	}
	all.Wait()
	sorted := slices.Concat(took...)
	slices.Sort(sorted)
	if len(sorted) == 0 {
		return
	}
	for name, q := range map[string]float64{"p50-µs": 0.5, "p99-µs": 0.99} {
		b.ReportMetric(float64(sorted[int(q*float64(len(sorted)-1))])/1e3, name)
	}
}
