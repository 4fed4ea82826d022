package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/registry"
)

const (
	home   = "127.0.0.1:5000" // loopback: plain HTTP by default
	mirror = "127.0.0.1:5001"
	bucket = "127.0.0.1:5002" // where signed URLs lead
	repo   = home + "/lib/app"
)

// fakeNet is a network of pipes, so that a synctest bubble sees when everything
// waits. Addresses are names only: nothing listens.
type fakeNet struct {
	mu    sync.Mutex
	hosts map[string]*pipeListener
}

func newFakeNet() *fakeNet { return &fakeNet{hosts: map[string]*pipeListener{}} }

// serve answers for addr until the returned function is called, which waits for the answers that are under way: a bubble whose test has
// ended wakes nobody who sleeps.
func (n *fakeNet) serve(addr string, h http.Handler) (stop func()) {
	l := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
	n.mu.Lock()
	n.hosts[addr] = l
	n.mu.Unlock()
	s := &fakeHost{Handler: h}
	srv := &http.Server{Handler: s}
	go srv.Serve(l)
	return func() {
		srv.Close()
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		s.answers.Wait()
	}
}

// fakeHost counts the answers that are under way.
type fakeHost struct {
	http.Handler
	mu      sync.Mutex // guards closed
	closed  bool
	answers sync.WaitGroup
}

func (s *fakeHost) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.answers.Add(1)
	s.mu.Unlock()
	defer s.answers.Done()
	s.Handler.ServeHTTP(w, r)
}

func (n *fakeNet) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	n.mu.Lock()
	l := n.hosts[addr]
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	}
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// origin is a registry that behaves, unless a hook does something first.
type origin struct {
	mu        sync.Mutex
	blobs     map[string][]byte
	manifests map[string][]byte
	requests  []*http.Request
	// hook sees each request with its number, from 1, among those for blobs (or
	// among those for anything else). It returns true if it has answered.
	hook                        func(w http.ResponseWriter, r *http.Request, n int) bool
	blobRequests, otherRequests int
}

func newOrigin() *origin {
	return &origin{blobs: map[string][]byte{}, manifests: map[string][]byte{}}
}

func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, object, isBlob := strings.Cut(r.URL.Path, "/blobs/")
	o.mu.Lock()
	o.requests = append(o.requests, r)
	count := &o.otherRequests
	if isBlob {
		count = &o.blobRequests
	}
	*count++
	n := *count
	o.mu.Unlock()
	if o.hook != nil && o.hook(w, r, n) {
		return
	}
	if isBlob {
		o.serveBlob(w, r, object)
		return
	}
	_, object, _ = strings.Cut(r.URL.Path, "/manifests/")
	data, ok := o.manifests[object]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such thing"}]}`)
		return
	}
	w.Write(data)
}

func (o *origin) serveBlob(w http.ResponseWriter, r *http.Request, object string) {
	data, ok := o.blobs[object]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

// seen returns the requests so far.
func (o *origin) seen() []*http.Request {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]*http.Request(nil), o.requests...)
}

// addBlob makes size random bytes and serves them.
func (o *origin) addBlob(size int) (registry.Layer, []byte) {
	data := make([]byte, size)
	src := rand.NewChaCha8([32]byte{byte(size), byte(size >> 8)})
	src.Read(data)
	d := digest.FromBytes(data)
	o.blobs[d.String()] = data
	return registry.Layer{Digest: d, Size: int64(size)}, data
}

type object = map[string]any

func encode(t testing.TB, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func desc(mediaType string, data []byte) object {
	return object{"mediaType": mediaType, "digest": digest.FromBytes(data).String(), "size": len(data)}
}

const (
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	ociConfig   = "application/vnd.oci.image.config.v1+json"
	ociLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// addImage serves an image of one layer under tag and its digest, after mutate
// has had its way with the manifest.
func (o *origin) addImage(t testing.TB, tag string, mutate func(m object)) digest.Digest {
	t.Helper()
	l, data := o.addBlob(1000)
	cfg := encode(t, object{"os": "linux", "architecture": runtime.GOARCH,
		"rootfs": object{"type": "layers", "diff_ids": []string{l.Digest.String()}}})
	o.blobs[digest.FromBytes(cfg).String()] = cfg
	m := object{"schemaVersion": 2, "mediaType": ociManifest,
		"config": desc(ociConfig, cfg), "layers": []object{desc(ociLayer, data)}}
	if mutate != nil {
		mutate(m)
	}
	return o.addManifest(tag, encode(t, m))
}

func (o *origin) addManifest(tag string, data []byte) digest.Digest {
	d := digest.FromBytes(data)
	o.manifests[tag], o.manifests[d.String()] = data, data
	return d
}

// newClient has small ranges, so that small blobs have many. It sees no
// configuration of the machine.
func newClient(t testing.TB, n *fakeNet, cfg registry.Config) *registry.Client {
	t.Helper()
	if cfg.DockerConfig == "" {
		cfg.DockerConfig = writeFile(t, "config.json", "{}")
	}
	if cfg.MaxRangeBytes == 0 {
		cfg.MaxRangeBytes = 4096
	}
	if n != nil {
		cfg.DialContext = n.dial
	}
	c, err := registry.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func writeFile(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// mustIs checks err against a target; a nil target means success.
func mustIs(t testing.TB, err, target error) {
	t.Helper()
	if target == nil && err != nil {
		t.Fatalf("unexpected error: %v", err)
	}
	if target != nil && !errors.Is(err, target) {
		t.Fatalf("got error %v, want %v", err, target)
	}
}
