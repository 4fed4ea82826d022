package registry_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-serverless/hearth/registry"
)

func gauge(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	mustIs(t, err, nil)
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

// Twenty blobs are open and nineteen consumers stall: memory stays within the
// budget, and the twentieth still gets all of its bytes.
func TestMemoryBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const (
			blobs, rangeBytes = 20, 4096
			budget            = 10 * rangeBytes
		)
		o := newOrigin()
		n := newFakeNet()
		defer n.serve(home, o)()
		reg := prometheus.NewRegistry()
		c := newClient(t, n, registry.Config{MaxRangeBytes: rangeBytes, MemoryBytes: budget, Registerer: reg})
		defer c.Close()

		check := func() {
			t.Helper()
			synctest.Wait()
			if used := gauge(t, reg, "hearth_registry_buffer_bytes"); used > budget+blobs*rangeBytes {
				t.Fatalf("%v bytes in use", used)
			}
		}
		var want []byte
		var readers []io.ReadCloser
		for i := range blobs {
			l, data := o.addBlob(200_000 + i)
			r, err := c.Open(t.Context(), repo, l)
			mustIs(t, err, nil)
			defer r.Close()
			readers, want = append(readers, r), data
			check()
		}
		if used := gauge(t, reg, "hearth_registry_buffer_bytes"); used < budget {
			t.Errorf("only %v bytes are used to fetch ahead", used)
		}
		for _, r := range readers[:blobs-1] { // stalls in the midst of a block
			_, err := io.ReadFull(r, make([]byte, 10_000))
			mustIs(t, err, nil)
			check()
		}
		got, err := io.ReadAll(readers[blobs-1])
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) {
			t.Error("wrong bytes")
		}
		for _, r := range readers {
			r.Close()
		}
		if used := gauge(t, reg, "hearth_registry_buffer_bytes"); used != 0 {
			t.Errorf("%v bytes in use after all is closed", used)
		}
		if n := gauge(t, reg, "hearth_registry_requests_in_flight"); n != 0 {
			t.Errorf("%v requests in flight after all is closed", n)
		}
	})
}

// A span whose range is ignored takes the rest; those after it, fetched already,
// must not keep their blocks.
func TestTakeRestGivesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		l, want := o.addBlob(100_000)
		o.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
			if strings.HasPrefix(r.Header.Get("Range"), "bytes=8192-") {
				time.Sleep(100 * time.Millisecond) // until the spans after it are fetched, and before one is asked for twice
				r.Header.Del("Range")
			}
			return false
		}
		n := newFakeNet()
		defer n.serve(home, o)()
		reg := prometheus.NewRegistry()
		c := newClient(t, n, registry.Config{MaxParallel: 5, Registerer: reg})
		defer c.Close()
		r, err := c.Open(t.Context(), repo, l)
		mustIs(t, err, nil)
		var buf bytes.Buffer
		_, err = r.(io.WriterTo).WriteTo(&buf)
		mustIs(t, err, nil)
		if !bytes.Equal(buf.Bytes(), want) {
			t.Error("wrong bytes")
		}
		synctest.Wait()
		if used := gauge(t, reg, "hearth_registry_buffer_bytes"); used != 0 {
			t.Errorf("%v bytes in use at the end of the blob", used)
		}
		r.Close()
	})
}

func TestCancelFreesEverything(t *testing.T) {
	hang := func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n > 2 {
			<-r.Context().Done()
		}
		return n > 2
	}
	tests := []struct {
		name string
		end  func(cancel context.CancelFunc, r io.Closer)
		want error
	}{
		{"context", func(cancel context.CancelFunc, _ io.Closer) { cancel() }, context.Canceled},
		{"close", func(_ context.CancelFunc, r io.Closer) { r.Close() }, context.Canceled},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOrigin()
				o.hook = hang
				l, _ := o.addBlob(100_000)
				n := newFakeNet()
				defer n.serve(home, o)()
				reg := prometheus.NewRegistry()
				c := newClient(t, n, registry.Config{Registerer: reg})
				defer c.Close()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				r, err := c.Open(ctx, repo, l)
				mustIs(t, err, nil)
				got := make(chan error)
				go func() {
					_, err := io.Copy(io.Discard, r)
					got <- err
				}()
				synctest.Wait() // the reader waits for bytes that never come
				tt.end(cancel, r)
				mustIs(t, <-got, tt.want)
				mustIs(t, r.Close(), nil)
				mustIs(t, r.Close(), nil)
				if _, err := r.Read(make([]byte, 1)); err == nil {
					t.Error("read after close succeeded")
				}
				if used := gauge(t, reg, "hearth_registry_buffer_bytes"); used != 0 {
					t.Errorf("%v bytes in use", used)
				}
			})
		})
	}
}

// Close gives back what is fetched and unread of the span being read, too.
func TestCloseInMidSpan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		l, _ := o.addBlob(2 << 20)
		n := newFakeNet()
		defer n.serve(home, o)()
		reg := prometheus.NewRegistry()
		c := newClient(t, n, registry.Config{MaxRangeBytes: 1 << 20, Registerer: reg})
		defer c.Close()
		r, err := c.Open(t.Context(), repo, l)
		mustIs(t, err, nil)
		_, err = io.ReadFull(r, make([]byte, 1000))
		mustIs(t, err, nil)
		synctest.Wait()
		mustIs(t, r.Close(), nil)
		if used := gauge(t, reg, "hearth_registry_buffer_bytes"); used != 0 {
			t.Errorf("%v bytes in use", used)
		}
	})
}

func TestCloseWithoutRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		l, _ := o.addBlob(1 << 20)
		n := newFakeNet()
		defer n.serve(home, o)()
		c := newClient(t, n, registry.Config{})
		defer c.Close()
		r, err := c.Open(t.Context(), repo, l)
		mustIs(t, err, nil)
		synctest.Wait()
		mustIs(t, r.Close(), nil)
		if got := len(o.seen()); got < 4 || got > 16 {
			t.Errorf("%d ranges fetched ahead of a reader that reads nothing", got)
		}
	})
}

// From a far registry all that memory has room for is fetched, from a near one what a reader may soon want.
func TestFarIsFetchedAhead(t *testing.T) {
	const memory = 64 * 4096
	ahead := func(first time.Duration) (used float64) {
		synctest.Test(t, func(t *testing.T) {
			o := newOrigin()
			o.hook = func(http.ResponseWriter, *http.Request, int) bool {
				time.Sleep(first)
				return false
			}
			l, _ := o.addBlob(4 * memory)
			n := newFakeNet()
			defer n.serve(home, o)()
			reg := prometheus.NewRegistry()
			c := newClient(t, n, registry.Config{MaxRangeBytes: 4096, MemoryBytes: memory, Registerer: reg})
			defer c.Close()
			r, err := c.Open(t.Context(), repo, l)
			mustIs(t, err, nil)
			time.Sleep(time.Minute)
			used = gauge(t, reg, "hearth_registry_buffer_bytes")
			mustIs(t, r.Close(), nil)
		})
		return used
	}
	if near, far := ahead(time.Millisecond), ahead(20*time.Millisecond); far < memory*9/10 || near > memory/2 {
		t.Errorf("of %d bytes, %v are used for a near registry and %v for a far one", memory, near, far)
	}
}
