package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-serverless/hearth/registry"
)

// pull reads all of l through a fresh client in a synctest bubble, which also
// proves that no goroutine outlives the reader and the client.
func pull(t *testing.T, o *origin, l registry.Layer, cfg registry.Config) (data []byte, took time.Duration, err error) {
	t.Helper()
	n := newFakeNet()
	defer n.serve(home, o)()
	c := newClient(t, n, cfg)
	defer c.Close()
	start := time.Now()
	data, err = readLayer(t.Context(), c, l)
	return data, time.Since(start), err
}

func readLayer(ctx context.Context, c *registry.Client, l registry.Layer) ([]byte, error) {
	r, err := c.Open(ctx, repo+":1", l)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(struct{ io.Reader }{r})
}

// hook is a fault that some requests of a blob meet with.
type hook = func(w http.ResponseWriter, r *http.Request, n int) bool

func TestOpenFaults(t *testing.T) {
	const size = 100_000
	o := newOrigin()
	layer, want := o.addBlob(size)
	full := func(w http.ResponseWriter) { w.Write(want) }
	ranged := func(w http.ResponseWriter, r *http.Request) (first, last int) {
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
		return first, last
	}
	status := func(code int, until int) hook {
		return func(w http.ResponseWriter, _ *http.Request, n int) bool {
			if n <= until {
				w.WriteHeader(code)
			}
			return n <= until
		}
	}
	partial := func(w http.ResponseWriter, contentRange string, body []byte) bool {
		if contentRange != "" {
			w.Header().Set("Content-Range", contentRange)
		}
		w.WriteHeader(http.StatusPartialContent)
		w.Write(body)
		return true
	}
	tests := []struct {
		name string
		hook hook
		err  error
	}{
		{"well behaved", nil, nil},
		{"ranges ignored", func(w http.ResponseWriter, r *http.Request, _ int) bool { full(w); return true }, nil},
		{"ranges ignored, chunked", func(w http.ResponseWriter, r *http.Request, _ int) bool {
			w.(http.Flusher).Flush()
			full(w)
			return true
		}, nil},
		{"ranges ignored from the 4th request on", func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n >= 4 {
				full(w)
			}
			return n >= 4
		}, nil},
		{"ranges ignored by every 3rd request, and cut", func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n%3 == 0 && n < 12 {
				w.Write(want[:size/2])
				panic(http.ErrAbortHandler)
			}
			return false
		}, nil},
		{"no Content-Range", func(w http.ResponseWriter, r *http.Request, _ int) bool {
			return partial(w, "", want[:4096])
		}, registry.ErrProtocol},
		{"range from elsewhere", func(w http.ResponseWriter, r *http.Request, n int) bool {
			first, last := ranged(w, r)
			return n == 3 && partial(w, fmt.Sprintf("bytes %d-%d/%d", first+1, last, size), want[first+1:last+1])
		}, registry.ErrProtocol},
		{"range longer than asked", func(w http.ResponseWriter, r *http.Request, n int) bool {
			first, last := ranged(w, r)
			return n == 1 && partial(w, fmt.Sprintf("bytes %d-%d/%d", first, last+1, size), want[first:last+2])
		}, registry.ErrProtocol},
		{"another total", func(w http.ResponseWriter, r *http.Request, n int) bool {
			first, last := ranged(w, r)
			return partial(w, fmt.Sprintf("bytes %d-%d/%d", first, last, size+1), want[first:last+1])
		}, registry.ErrSize},
		{"Content-Length against Content-Range", func(w http.ResponseWriter, r *http.Request, n int) bool {
			first, last := ranged(w, r)
			return partial(w, fmt.Sprintf("bytes %d-%d/%d", first, last, size), want[first:last])
		}, registry.ErrSize},
		{"unknown total", func(w http.ResponseWriter, r *http.Request, n int) bool {
			first, last := ranged(w, r)
			return partial(w, fmt.Sprintf("bytes %d-%d/*", first, last), want[first:last+1])
		}, nil},
		{"whole body too short", func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Content-Length", strconv.Itoa(size-1))
			w.Write(want[:size-1])
			return true
		}, io.ErrUnexpectedEOF},
		{"chunked body always too short", func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.(http.Flusher).Flush()
			w.Write(want[:size-1])
			return true
		}, io.ErrUnexpectedEOF},
		{"whole body too long", func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Content-Length", strconv.Itoa(size+1))
			w.Write(append(bytes.Clone(want), 0))
			return true
		}, registry.ErrSize},
		{"chunked body too long", func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.(http.Flusher).Flush()
			full(w)
			w.Write([]byte{0})
			return true
		}, registry.ErrSize},
		{"multipart answer", func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Content-Type", "multipart/byteranges; boundary=x")
			return partial(w, "", []byte("--x"))
		}, registry.ErrProtocol},
		{"no content", status(http.StatusNoContent, 99), registry.ErrProtocol},
		{"every other connection dropped", func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n%2 == 1 {
				panic(http.ErrAbortHandler)
			}
			return false
		}, nil},
		{"burst of 500", status(500, 4), nil},
		{"burst of 502", status(502, 4), nil},
		{"always 503", status(503, 1<<30), &registry.StatusError{}},
		{"404", status(404, 99), registry.ErrNotFound},
		{"403", status(403, 99), registry.ErrUnauthorized},
		{"416", status(416, 99), &registry.StatusError{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := &origin{blobs: o.blobs, hook: tt.hook}
				got, _, err := pull(t, o, layer, registry.Config{})
				if _, any := tt.err.(*registry.StatusError); any {
					var se *registry.StatusError
					if !errors.As(err, &se) {
						t.Fatalf("got error %v, want a StatusError", err)
					}
					return
				}
				mustIs(t, err, tt.err)
				if tt.err == nil && !bytes.Equal(got, want) {
					t.Fatalf("got %d bytes that differ from the %d served", len(got), len(want))
				}
				if tt.err != nil && !strings.Contains(err.Error(), layer.Digest.String()) {
					t.Errorf("error does not name the layer: %v", err)
				}
			})
		})
	}
}

func TestOpenSizes(t *testing.T) {
	for _, size := range []int{0, 1, 4095, 4096, 4097, 8192, 50_000} {
		synctest.Test(t, func(t *testing.T) {
			o := newOrigin()
			l, want := o.addBlob(size)
			got, _, err := pull(t, o, l, registry.Config{})
			mustIs(t, err, nil)
			if !bytes.Equal(got, want) {
				t.Errorf("size %d: wrong bytes", size)
			}
			if n := len(o.seen()); n != (size+4095)/4096 {
				t.Errorf("size %d: %d requests", size, n)
			}
			for _, r := range o.seen() {
				if closed := r.Header.Get("Range"); size > 4096 && (closed == "" || strings.HasSuffix(closed, "-")) {
					t.Errorf("size %d: range %q is not closed", size, closed)
				}
			}
		})
	}
}

// Each connection breaks after a random number of bytes, some, where that cannot
// meet one range too often, almost at once. A range breaks far more often than an
// attempt without progress may be repeated.
func TestOpenCutAtRandomBytes(t *testing.T) {
	for seed := range uint64(5) {
		synctest.Test(t, func(t *testing.T) {
			o := newOrigin()
			l, want := o.addBlob(3 << 20)
			parallel := 1 + 2*int(seed%2)
			var mu sync.Mutex
			rnd := rand.New(rand.NewPCG(seed, 1))
			o.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
				mu.Lock()
				cut := 66<<10 + rnd.IntN(40<<10)
				if parallel == 1 && n%4 == 0 {
					cut = rnd.IntN(1000)
				}
				mu.Unlock()
				o.serveBlob(&cutWriter{w, cut}, r, l.Digest.String())
				return true
			}
			got, _, err := pull(t, o, l, registry.Config{MaxRangeBytes: 1 << 20, MaxParallel: parallel})
			mustIs(t, err, nil)
			if !bytes.Equal(got, want) {
				t.Fatal("wrong bytes")
			}
		})
	}
}

// cutWriter breaks the connection after so many bytes of the body.
type cutWriter struct {
	http.ResponseWriter
	left int
}

func (w *cutWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p[:min(len(p), w.left)])
	if w.left -= n; w.left == 0 {
		w.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

func TestOpenShortRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		l, want := o.addBlob(1 << 20)
		o.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
			var first, last int
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, min(last, first+(80<<10))))
			return false
		}
		got, _, err := pull(t, o, l, registry.Config{MaxRangeBytes: 256 << 10})
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) {
			t.Fatal("wrong bytes")
		}
	})
}

func TestRetryAfter(t *testing.T) {
	tests := []struct {
		name     string
		header   string
		deadline time.Duration
		min, max time.Duration
		fails    bool
	}{
		{"seconds", "7", 0, 7 * time.Second, 8 * time.Second, false},
		{"date", "Sat, 01 Jan 2000 00:00:20 GMT", 0, 19 * time.Second, 21 * time.Second, false}, // synctest starts in 2000
		{"bounded", "3600", 0, 30 * time.Second, 31 * time.Second, false},
		{"nonsense", "soon", 0, 0, time.Second, false},
		{"negative", "-5", 0, 0, time.Second, false},
		{"beyond the deadline", "20", 10 * time.Second, 0, time.Second, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOrigin()
				l, _ := o.addBlob(3000)
				o.hook = func(w http.ResponseWriter, _ *http.Request, n int) bool {
					if n == 1 {
						w.Header().Set("Retry-After", tt.header)
						w.WriteHeader(http.StatusTooManyRequests)
					}
					return n == 1
				}
				n := newFakeNet()
				defer n.serve(home, o)()
				c := newClient(t, n, registry.Config{})
				defer c.Close()
				ctx := t.Context()
				if tt.deadline > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tt.deadline)
					defer cancel()
				}
				start := time.Now()
				_, err := readLayer(ctx, c, l)
				if (err != nil) != tt.fails {
					t.Fatalf("error %v", err)
				}
				var se *registry.StatusError
				if tt.fails && (!errors.As(err, &se) || se.Code != 429 || se.RetryAfter != 20*time.Second) {
					t.Errorf("error %v does not carry the status", err)
				}
				if took := time.Since(start); took < tt.min || took > tt.max {
					t.Errorf("took %v, want %v to %v", took, tt.min, tt.max)
				}
			})
		})
	}
}

// A host that takes a request and says nothing is asked again, too.
func TestSilenceIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		l, want := o.addBlob(20_000)
		o.hook = func(_ http.ResponseWriter, r *http.Request, n int) bool {
			if n == 2 {
				<-r.Context().Done()
			}
			return n == 2
		}
		got, took, err := pull(t, o, l, registry.Config{MaxParallel: 1, StallTimeout: time.Second})
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) || took < time.Second || took > 2*time.Second {
			t.Errorf("%d bytes after %v", len(got), took)
		}
	})
}

func TestStallIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		l, want := o.addBlob(20_000)
		o.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n != 2 {
				return false
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 4096-8191/%d", l.Size))
			w.Header().Set("Content-Length", "4096")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(want[4096:5000])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return true
		}
		got, took, err := pull(t, o, l, registry.Config{MaxParallel: 1})
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) {
			t.Fatal("wrong bytes")
		}
		if took < registry.DefaultStallTimeout || took > registry.DefaultStallTimeout+time.Second {
			t.Errorf("took %v", took)
		}
		resumed := func(r *http.Request) bool { return r.Header.Get("Range") == "bytes=5000-8191" }
		if !slices.ContainsFunc(o.seen(), resumed) {
			t.Error("the range was not resumed where it stalled")
		}
	})
}

// A consumer that takes its time is no stall.
func TestSlowConsumerIsNoStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		l, want := o.addBlob(40_000)
		n := newFakeNet()
		defer n.serve(home, o)()
		c := newClient(t, n, registry.Config{MemoryBytes: 1})
		defer c.Close()
		r, err := c.Open(t.Context(), repo, l)
		mustIs(t, err, nil)
		defer r.Close()
		var got []byte
		buf := make([]byte, 3000)
		for {
			time.Sleep(time.Minute)
			n, err := r.Read(buf)
			got = append(got, buf[:n]...)
			if err == io.EOF {
				break
			}
			mustIs(t, err, nil)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("wrong bytes")
		}
		if len(o.seen()) != 10 {
			t.Errorf("%d requests for 10 ranges", len(o.seen()))
		}
	})
}
