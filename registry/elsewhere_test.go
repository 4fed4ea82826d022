package registry_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-serverless/hearth/registry"
)

// signer is a registry that sends on to a bucket for its blobs, and the rule by which the bucket checks what it signed.
type signer struct {
	*origin
	store   *origin
	life    time.Duration // of a signature; 0: for ever
	header  http.Header   // of its redirects
	referer bool          // the bucket insists on it

	mu     sync.Mutex
	signed int
}

func newSigner(l registry.Layer) *signer {
	s := &signer{origin: newOrigin(), store: newOrigin(), header: http.Header{}}
	s.origin.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
		s.mu.Lock()
		s.signed++
		s.mu.Unlock()
		w.Header()["Cache-Control"] = s.header["Cache-Control"]
		q := url.Values{"sig": {fmt.Sprint(time.Now().UnixNano())}}
		http.Redirect(w, r, "http://"+bucket+"/b/blobs/"+l.Digest.String()+"?"+q.Encode(), http.StatusTemporaryRedirect)
		return true
	}
	s.store.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
		time.Sleep(100 * time.Millisecond)
		var at int64
		fmt.Sscan(r.URL.Query().Get("sig"), &at)
		if s.life > 0 && time.Since(time.Unix(0, at)) > s.life || s.referer && !strings.HasPrefix(r.Referer(), "http://"+home+"/") {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return false
	}
	return s
}

func TestRedirectIsUsedAgain(t *testing.T) {
	tests := []struct {
		name        string
		set         func(s *signer)
		least, most int // signatures for 25 ranges, one after the other, of 100 ms each
	}{
		{"for ever", func(*signer) {}, 1, 1},
		{"with a Referer", func(s *signer) { s.referer = true }, 1, 1},
		{"until it is refused", func(s *signer) { s.life = time.Second }, 3, 4},
		{"until it says", func(s *signer) { s.header.Set("Cache-Control", "max-age=3") }, 3, 4},
		{"never", func(s *signer) { s.header.Set("Cache-Control", "no-store") }, 25, 25},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, want := newOrigin().addBlob(25 * 4096)
				s := newSigner(l)
				s.store.blobs[l.Digest.String()] = want
				tt.set(s)
				n := newFakeNet()
				defer n.serve(home, s)()
				defer n.serve(bucket, s.store)()
				reg := prometheus.NewRegistry()
				c := newClient(t, n, registry.Config{MaxParallel: 1, Registerer: reg})
				defer c.Close()
				got, err := readLayer(t.Context(), c, l)
				mustIs(t, err, nil)
				if !bytes.Equal(got, want) {
					t.Error("wrong bytes")
				}
				if s.signed < tt.least || s.signed > tt.most {
					t.Errorf("the registry was asked %d times, want %d to %d", s.signed, tt.least, tt.most)
				}
				if n := counter(t, reg, "hearth_registry_retries_total", ""); n > 0 {
					t.Errorf("%v retries", n)
				}
				for _, r := range s.store.seen() {
					if first, last := ranged(r); last-first != 4095 {
						t.Errorf("the bucket was asked for %q", r.Header.Get("Range"))
					}
				}
			})
		})
	}
}

// A bucket that is gone is no reason to ask it again: the registry may send us elsewhere.
func TestRedirectToWhereNoOneIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, want := newOrigin().addBlob(25 * 4096)
		s := newSigner(l)
		s.store.blobs[l.Digest.String()] = want
		n := newFakeNet()
		defer n.serve(home, s)()
		stop := n.serve(bucket, s.store)
		c := newClient(t, n, registry.Config{MaxParallel: 1})
		defer c.Close()
		time.AfterFunc(time.Second, func() {
			s.origin.hook = nil
			s.origin.blobs[l.Digest.String()] = want
			stop()
		})
		got, err := readLayer(t.Context(), c, l)
		mustIs(t, err, nil)
		if !bytes.Equal(got, want) {
			t.Error("wrong bytes")
		}
	})
}

// deadNet is a network on which some hosts take their time to not answer.
type deadNet struct {
	*fakeNet
	timeout time.Duration

	mu    sync.Mutex
	dead  map[string]bool
	dials map[string]int
}

func (n *deadNet) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	n.mu.Lock()
	n.dials[addr]++
	dead := n.dead[addr]
	n.mu.Unlock()
	if !dead {
		return n.fakeNet.dial(ctx, network, addr)
	}
	select {
	case <-time.After(n.timeout):
		return nil, fmt.Errorf("dial %s: timeout", addr)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (n *deadNet) set(addr string, dead bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dead[addr] = dead
}

// A dead mirror costs its dial timeout once, not for each blob; it is asked again when it may have recovered; and if all others
// fail it is asked after all.
func TestDeadMirrorIsRemembered(t *testing.T) {
	dir := hostsDir(t, mirrored)
	synctest.Test(t, func(t *testing.T) {
		const timeout = 30 * time.Second
		n := &deadNet{fakeNet: newFakeNet(), timeout: timeout, dead: map[string]bool{mirror: true}, dials: map[string]int{}}
		o := newOrigin()
		defer n.serve(home, o)()
		defer n.serve(mirror, o)()
		reg := prometheus.NewRegistry()
		c, err := registry.New(registry.Config{
			HostsDir: dir, DockerConfig: writeFile(t, "config.json", "{}"), DialContext: n.dial, MaxRangeBytes: 4096, Registerer: reg,
		})
		mustIs(t, err, nil)
		defer c.Close()
		read := func(size int) time.Duration {
			t.Helper()
			start := time.Now()
			l, want := o.addBlob(size)
			got, err := readLayer(t.Context(), c, l)
			mustIs(t, err, nil)
			if !bytes.Equal(got, want) {
				t.Error("wrong bytes")
			}
			return time.Since(start)
		}
		if took := read(50_000); took != timeout {
			t.Errorf("the first blob took %v", took)
		}
		for i := range 5 {
			if took := read(50_001 + i); took > 0 {
				t.Errorf("blob %d took %v", i, took)
			}
		}
		if n.dials[mirror] != 1 {
			t.Errorf("the mirror was dialled %d times", n.dials[mirror])
		}
		if counter(t, reg, "hearth_registry_hosts_skipped_total", "") < 5 {
			t.Error("the metrics do not show it")
		}

		n.set(mirror, false)
		time.Sleep(time.Minute)
		before := len(o.seen())
		read(60_000)
		for _, r := range o.seen()[before:] {
			if r.Host != mirror {
				t.Fatalf("%s was asked although the mirror has recovered", r.Host)
			}
		}

		n.set(mirror, true)
		c.Close() // connections
		read(60_001)
		n.set(mirror, false)
		n.set(home, true)
		c.Close()
		if took := read(60_002); took > 4*timeout {
			t.Errorf("with the registry dead and the mirror left out it took %v", took)
		}
	})
}
