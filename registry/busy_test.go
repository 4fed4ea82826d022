package registry_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-serverless/hearth/registry"
)

// counter adds up a metric over all of its labels, or over those that have value.
func counter(t *testing.T, reg *prometheus.Registry, name, value string) (sum float64) {
	t.Helper()
	families, err := reg.Gather()
	mustIs(t, err, nil)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if value == "" || len(m.GetLabel()) == 1 && m.GetLabel()[0].GetValue() == value {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// ranged is the range that a request asks for.
func ranged(r *http.Request) (first, last int64) {
	fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
	return first, last
}

// addBlobs serves n blobs of some size or a little more.
func (o *origin) addBlobs(n, size int) (layers []registry.Layer) {
	for i := range n {
		l, _ := o.addBlob(size + i)
		layers = append(layers, l)
	}
	return layers
}

// readAll reads a blob and compares it.
func readAll(t *testing.T, c *registry.Client, o *origin, l registry.Layer) {
	if got, err := readLayer(t.Context(), c, l); err != nil || !bytes.Equal(got, o.blobs[l.Digest.String()]) {
		t.Errorf("layer of %d bytes: %d bytes, %v", l.Size, len(got), err)
	}
}

// Thirty blobs from one host ask for no more at once than one does.
func TestManyBlobsShareAHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 3
		var mu sync.Mutex
		var now, most int
		o := newOrigin()
		o.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			mu.Lock()
			now--
			mu.Unlock()
			return false
		}
		n := newFakeNet()
		defer n.serve(home, o)()
		c := newClient(t, n, registry.Config{MaxParallel: limit})
		defer c.Close()
		var all sync.WaitGroup
		for _, l := range o.addBlobs(30, 20_000) {
			all.Go(func() { readAll(t, c, o, l) })
		}
		all.Wait()
		if most != limit {
			t.Errorf("%d requests at once, want %d", most, limit)
		}
	})
}

// Consumers that stall hold no one up, on a host that ignores ranges and may be asked once at a time either.
func TestStalledConsumersLeaveTheHostToOthers(t *testing.T) {
	for _, ignored := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			o := newOrigin()
			o.hook = func(_ http.ResponseWriter, r *http.Request, _ int) bool {
				if ignored {
					r.Header.Del("Range")
				}
				return false
			}
			n := newFakeNet()
			defer n.serve(home, o)()
			c := newClient(t, n, registry.Config{MaxParallel: 1, MemoryBytes: 1})
			defer c.Close()
			for i := range 5 {
				l, _ := o.addBlob(100_000 + i)
				r, err := c.Open(t.Context(), repo, l)
				mustIs(t, err, nil)
				defer r.Close()
				synctest.Wait()
			}
			l, want := o.addBlob(50_000)
			got, err := readLayer(t.Context(), c, l)
			mustIs(t, err, nil)
			if !bytes.Equal(got, want) {
				t.Error("wrong bytes")
			}
		})
	}
}

// When a host says to one blob that it is busy, no other asks it before the time that it has named, and all come to their end.
func TestBusyHostIsLeftAloneByAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pause = 7 * time.Second
		start := time.Now()
		var mu sync.Mutex
		var at []time.Duration
		o := newOrigin()
		o.hook = func(w http.ResponseWriter, _ *http.Request, n int) bool {
			mu.Lock()
			at = append(at, time.Since(start))
			mu.Unlock()
			if n < 20 || time.Since(start) >= pause {
				return false
			}
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}
		n := newFakeNet()
		defer n.serve(home, o)()
		reg := prometheus.NewRegistry()
		c := newClient(t, n, registry.Config{Registerer: reg})
		defer c.Close()
		var all sync.WaitGroup
		for _, l := range o.addBlobs(10, 100_000) {
			all.Go(func() { readAll(t, c, o, l) })
		}
		all.Wait()
		refused := 0
		for _, d := range at {
			if d > 0 && d < pause {
				t.Errorf("a request after %v", d)
			}
			if d < pause {
				refused++
			}
		}
		if over := refused - 19; over < 1 || over > 8 { // what was under way at once
			t.Errorf("%d requests refused", over)
		}
		if n := counter(t, reg, "hearth_registry_throttles_total", ""); n < 1 {
			t.Error("the metrics do not show it")
		}
	})
}

// A host that lets through a few requests a second, and says no more than that the others are too many, still serves a pull.
func TestRateLimitWithoutRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var second int64
		var let int
		o := newOrigin()
		o.hook = func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			mu.Lock()
			defer mu.Unlock()
			if now := time.Now().Unix(); now != second {
				second, let = now, 0
			}
			if let++; let > 5 {
				w.WriteHeader(http.StatusTooManyRequests)
				return true
			}
			return false
		}
		l, want := o.addBlob(400_000)
		got, took, err := pull(t, o, l, registry.Config{})
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) || took > time.Minute {
			t.Errorf("%d bytes after %v", len(got), took)
		}
	})
}

// slowRange delays one range of a blob that otherwise comes at once, in the first request for it.
func slowRange(o *origin, l registry.Layer, from int64, delay func(w http.ResponseWriter, r *http.Request)) {
	var mu sync.Mutex
	slow := true
	o.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
		time.Sleep(10 * time.Millisecond)
		first, _ := ranged(r)
		mu.Lock()
		mine := slow && first == from
		slow = slow && !mine
		mu.Unlock()
		if mine {
			delay(w, r)
		}
		return mine
	}
}

// part answers a range up to a byte before its end, and goes on when the returned function is called.
func part(w http.ResponseWriter, r *http.Request, data []byte, upTo int64) (goOn func()) {
	first, last := ranged(r)
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(data)))
	w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
	w.WriteHeader(http.StatusPartialContent)
	w.Write(data[first : first+upTo])
	w.(http.Flusher).Flush()
	return func() { w.Write(data[first+upTo : last+1]) }
}

func TestHedge(t *testing.T) {
	const rangeBytes, from = 1 << 20, 6 << 20
	hang := func(r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(time.Hour):
		}
	}
	tests := []struct {
		name        string
		slow        func(w http.ResponseWriter, r *http.Request, data []byte)
		most        time.Duration // to read all of it
		won, hedges float64
	}{
		{"hangs before it answers", func(_ http.ResponseWriter, r *http.Request, _ []byte) { hang(r) }, time.Second, 1, 1},
		{"hangs in mid-range", func(w http.ResponseWriter, r *http.Request, data []byte) {
			part(w, r, data, rangeBytes/2+1000)
			hang(r)
		}, time.Second, 1, 1},
		{"crawls", func(w http.ResponseWriter, r *http.Request, data []byte) {
			first, last := ranged(r)
			part(w, r, data, 1)
			for at := first + 1; at <= last && r.Context().Err() == nil; at += 1000 {
				w.Write(data[at:min(at+1000, last+1)])
				time.Sleep(20 * time.Millisecond)
			}
		}, time.Second, 1, 1},
		{"is a little late", func(w http.ResponseWriter, r *http.Request, data []byte) {
			goOn := part(w, r, data, rangeBytes/2)
			time.Sleep(100 * time.Millisecond)
			goOn()
		}, time.Second, 0, 0},
		{"comes after all", func(w http.ResponseWriter, r *http.Request, data []byte) {
			goOn := part(w, r, data, rangeBytes/2+1000)
			time.Sleep(400 * time.Millisecond) // when the other has begun
			goOn()
		}, time.Second, 0, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOrigin()
				l, want := o.addBlob(20 << 20)
				slowRange(o, l, from, func(w http.ResponseWriter, r *http.Request) { tt.slow(w, r, want) })
				if tt.name == "comes after all" {
					first := o.hook
					o.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
						if first(w, r, n) {
							return true
						}
						if at, _ := ranged(r); at > from && at < from+rangeBytes { // the second request for it
							select {
							case <-r.Context().Done():
							case <-time.After(time.Minute):
							}
						}
						return false
					}
				}
				n := newFakeNet()
				defer n.serve(home, o)()
				reg := prometheus.NewRegistry()
				c := newClient(t, n, registry.Config{MaxRangeBytes: rangeBytes, Registerer: reg})
				defer c.Close()
				start := time.Now()
				got, err := readLayer(t.Context(), c, l)
				mustIs(t, err, nil)
				if took := time.Since(start); took > tt.most {
					t.Errorf("took %v", took)
				}
				if !bytes.Equal(got, want) {
					t.Error("wrong bytes")
				}
				if won := counter(t, reg, "hearth_registry_hedges_total", "won"); won != tt.won {
					t.Errorf("%v hedges won", won)
				}
				if all := counter(t, reg, "hearth_registry_hedges_total", ""); all != tt.hedges {
					t.Errorf("%v hedges", all)
				}
				if extra := counter(t, reg, "hearth_registry_hedged_bytes_total", ""); extra > rangeBytes {
					t.Errorf("%v bytes asked for twice", extra)
				}
				if used := gauge(t, reg, "hearth_registry_buffer_bytes"); used != 0 {
					t.Errorf("%v bytes in use", used)
				}
			})
		})
	}
}

// However many ranges are late, few bytes are asked for twice.
func TestHedgesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rangeBytes = 64 << 10
		o := newOrigin()
		l, want := o.addBlob(8 << 20)
		o.hook = func(_ http.ResponseWriter, r *http.Request, n int) bool {
			time.Sleep(10 * time.Millisecond)
			if n > 10 && n%2 == 0 {
				time.Sleep(2 * time.Second)
			}
			return false
		}
		n := newFakeNet()
		defer n.serve(home, o)()
		reg := prometheus.NewRegistry()
		c := newClient(t, n, registry.Config{MaxRangeBytes: rangeBytes, Registerer: reg})
		defer c.Close()
		got, err := readLayer(t.Context(), c, l)
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) {
			t.Error("wrong bytes")
		}
		extra := counter(t, reg, "hearth_registry_hedged_bytes_total", "")
		if extra == 0 || extra > float64(l.Size/16+rangeBytes) {
			t.Errorf("%v of %d bytes asked for twice", extra, l.Size)
		}
		time.Sleep(3 * time.Second) // the fake host is still asleep over those that nobody waits for
	})
}

func TestOpenRange(t *testing.T) {
	const size = 100_000
	for _, ignored := range []bool{false, true} {
		for _, tt := range []struct{ off, length int64 }{
			{0, 0}, {0, 1}, {0, size}, {size, 0}, {size - 1, 1}, {4096, 4096}, {5000, 50_000}, {1, size - 2}, {0, 30_000},
		} {
			t.Run(fmt.Sprintf("%d+%d ignored=%v", tt.off, tt.length, ignored), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := newOrigin()
					l, want := o.addBlob(size)
					o.hook = func(_ http.ResponseWriter, r *http.Request, _ int) bool {
						if ignored {
							r.Header.Del("Range")
						}
						return false
					}
					n := newFakeNet()
					defer n.serve(home, o)()
					reg := prometheus.NewRegistry()
					c := newClient(t, n, registry.Config{Registerer: reg})
					defer c.Close()
					r, err := c.OpenRange(t.Context(), repo, l, tt.off, tt.length)
					mustIs(t, err, nil)
					got, err := io.ReadAll(r)
					mustIs(t, err, nil)
					mustIs(t, r.Close(), nil)
					if !bytes.Equal(got, want[tt.off:tt.off+tt.length]) {
						t.Errorf("got %d other bytes", len(got))
					}
					if !ignored && counter(t, reg, "hearth_registry_fetched_bytes_total", "") != float64(tt.length) {
						t.Error("other bytes were fetched than those asked for")
					}
					if used := gauge(t, reg, "hearth_registry_buffer_bytes"); used != 0 {
						t.Errorf("%v bytes in use", used)
					}
				})
			})
		}
	}
	l, _ := newOrigin().addBlob(size)
	c := newClient(t, newFakeNet(), registry.Config{})
	for _, bad := range [][2]int64{{-1, 1}, {0, -1}, {0, size + 1}, {size, 1}, {size + 1, 0}, {1 << 62, 1 << 62}} {
		if _, err := c.OpenRange(t.Context(), repo, l, bad[0], bad[1]); err == nil || !strings.Contains(err.Error(), "wrong size") {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
