// Package faults is a registry that fails as real ones do: an HTTP proxy before an honest registry, which spoils the answers to
// those who ask for layers, each fault in its own way. Everything else passes as it is. It is for benchmarks and for tests.
package faults

import (
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Want is how a pull must end.
type Want int

const (
	// Right: the fault passes, or may be borne, so that the pull succeeds.
	Right Want = iota
	// Refused: the bytes are wrong for good, and the pull must say so.
	Refused
	// Either: it depends on who asks whether the bytes can be had.
	Either
)

// Fault is one way to fail.
type Fault struct {
	Name string
	// About says what the registry does.
	About string
	Want  Want
	// spoil returns a handler before an honest one, with a memory of its own. layers has the size of each.
	spoil func(layers map[string]int64, honest http.Handler) http.Handler
}

// Registry is the proxy. It counts what it sends of each layer.
type Registry struct {
	handler http.Handler

	mu   sync.Mutex // guards what follows
	sent map[string]int64
}

// New returns a proxy before the registry at address, which speaks plain HTTP, that spoils layers, given with their sizes by digest,
// by a fault. The zero Fault is none.
func New(address string, layers map[string]int64, fault Fault) *Registry {
	honest := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: address})
			r.Out.Host = r.In.Host // so that what the registry says of itself leads here again
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
	}
	r := &Registry{handler: honest, sent: map[string]int64{}}
	if fault.spoil != nil {
		r.handler = fault.spoil(layers, honest)
	}
	return r
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if digest := path.Base(req.URL.Path); req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
		w = &meter{ResponseWriter: w, add: func(n int) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.sent[digest] += int64(n)
		}}
	}
	r.handler.ServeHTTP(w, req)
}

// Sent is how many bytes of a blob were sent, to all who asked.
func (r *Registry) Sent(digest string) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent[digest]
}

type meter struct {
	http.ResponseWriter
	add func(int)
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.ResponseWriter.Write(p)
	m.add(n)
	return n, err
}

// Unwrap is for http.ResponseController.
func (m *meter) Unwrap() http.ResponseWriter { return m.ResponseWriter }

// ask is a request for a layer.
type ask struct {
	digest string
	bytes  int64 // of the whole layer
	times  int   // that the layer was asked for, with this
}

// eachAsk returns a handler that leaves requests for layers to one, and all others to the honest registry.
func eachAsk(layers map[string]int64, honest http.Handler, serve func(http.ResponseWriter, *http.Request, ask)) http.Handler {
	var mu sync.Mutex // guards times
	times := map[string]int{}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		digest := path.Base(r.URL.Path)
		bytes, ok := layers[digest]
		if !ok || r.Method != http.MethodGet {
			honest.ServeHTTP(w, r)
			return
		}
		mu.Lock()
		times[digest]++
		a := ask{digest: digest, bytes: bytes, times: times[digest]}
		mu.Unlock()
		serve(w, r, a)
	})
}

// asked returns the first and last byte of a range that a request asks for, as far as the layer goes; all of it if it asks for none.
func (a ask) asked(r *http.Request) (first, last int64, partial bool) {
	first, last = 0, a.bytes-1
	spec, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	if !ok {
		return first, last, false
	}
	from, to, _ := strings.Cut(spec, "-")
	n, err := strconv.ParseInt(from, 10, 64)
	if err != nil {
		return first, last, false
	}
	first = n
	if n, err := strconv.ParseInt(to, 10, 64); err == nil {
		last = min(last, n)
	}
	return first, last, true
}

// retryAfter answers with a status, and how long to wait.
func retryAfter(w http.ResponseWriter, status int, wait time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(int(wait.Round(time.Second)/time.Second)))
	http.Error(w, fmt.Sprintf(`{"errors":[{"code":"TOOMANYREQUESTS","message":%q}]}`, http.StatusText(status)), status)
}
