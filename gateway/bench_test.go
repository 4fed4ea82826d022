package gateway_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
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

// BenchmarkThaw is a request to a Function that has no endpoint, while poolmanager's answer (a frozen Instance, thawed) takes no time:
// what remains is what the gateway adds to a start, over a request to an Instance that is known (BenchmarkProxy).
//
//	go test ./gateway -run '^$' -bench Thaw -benchtime 2000x
func BenchmarkThaw(b *testing.B) {
	w := newWorld(b, loopback{b}, nil)
	in, _ := w.instance(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) }))
	var n atomic.Int64
	w.pool.allocate = func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		return allocated(&hearthv1.Instance{Id: in.GetId(), Address: in.GetAddress(), State: in.GetState(),
			Claim: &hearthv1.Claim{Id: fmt.Sprint(n.Add(1))}}), nil
	}
	// Each of these Functions is asked once.
	names := make([]string, b.N)
	for i := range names {
		names[i] = fmt.Sprintf("f%d", i)
		w.pool.set(names[i], func(*hearthv1.Endpoints) {})
	}
	w.settle()
	took := make([]time.Duration, 0, b.N)
	b.ResetTimer()
	for _, name := range names {
		begun := time.Now()
		if a := w.get("/fn/" + name); a.status != 200 {
			b.Fatal(a.status, a.body)
		}
		took = append(took, time.Since(begun))
	}
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2])/1e3, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100])/1e3, "p99-µs")
}
