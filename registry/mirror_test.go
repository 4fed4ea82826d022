package registry_test

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-serverless/hearth/registry"
)

// hostsDir writes a certs.d for home.
func hostsDir(t *testing.T, toml string) string {
	t.Helper()
	return filepath.Dir(filepath.Dir(writeFile(t, "127.0.0.1_5000_/hosts.toml", toml)))
}

const mirrored = `server = "http://` + home + `"
[host."http://` + mirror + `"]
  capabilities = ["pull"]
  [host."http://` + mirror + `".header]
    x-mirror-key = "k"
`

func TestMirrorFallback(t *testing.T) {
	fail := func(code, from int) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, _ *http.Request, n int) bool {
			if n >= from {
				w.WriteHeader(code)
			}
			return n >= from
		}
	}
	tests := []struct {
		name                string
		mirrorHook          hook
		mirrorDown          bool
		wantHome, wantQuick bool
	}{
		{"serves all", nil, false, false, true},
		{"has nothing", fail(404, 1), false, true, true},
		{"refuses", fail(403, 1), false, true, true},
		{"is busy", fail(429, 1), false, true, true},
		{"breaks in mid-blob", fail(500, 5), false, true, false},
		{"is down", nil, true, true, false},
		{"ignores ranges and cuts", func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			w.Write([]byte("x"))
			panic(http.ErrAbortHandler)
		}, false, true, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := hostsDir(t, mirrored)
			synctest.Test(t, func(t *testing.T) {
				o, m := newOrigin(), newOrigin()
				l, want := o.addBlob(60_000)
				o.addImage(t, "1", nil)
				m.blobs, m.manifests, m.hook = o.blobs, o.manifests, tt.mirrorHook
				if tt.name == "ignores ranges and cuts" {
					want[0] = 'x' // the byte it sends is taken for good
				}
				n := newFakeNet()
				defer n.serve(home, o)()
				if !tt.mirrorDown {
					defer n.serve(mirror, m)()
				}
				c := newClient(t, n, registry.Config{HostsDir: dir})
				defer c.Close()
				start := time.Now()
				got, err := readLayer(t.Context(), c, l)
				mustIs(t, err, nil)
				if !bytes.Equal(got, want) {
					t.Error("wrong bytes")
				}
				if took := time.Since(start); took > 2*time.Second || tt.wantQuick && took > 0 {
					t.Errorf("took %v", took)
				}
				if (len(o.seen()) > 0) != tt.wantHome {
					t.Errorf("%d requests to the registry itself", len(o.seen()))
				}
				for _, r := range m.seen() {
					if r.URL.Query().Get("ns") != home || r.Header.Get("X-Mirror-Key") != "k" {
						t.Errorf("mirror request lacks namespace or header: %v %v", r.URL, r.Header)
					}
				}
			})
		})
	}
}

// A mirror that may only pull is asked for digests, never for what a tag means.
func TestMirrorMayNotResolve(t *testing.T) {
	dir := hostsDir(t, mirrored)
	synctest.Test(t, func(t *testing.T) {
		o, m := newOrigin(), newOrigin()
		want := o.addImage(t, "1", nil)
		m.blobs, m.manifests = o.blobs, map[string][]byte{want.String(): o.manifests[want.String()], "1": []byte("lies")}
		n := newFakeNet()
		defer n.serve(home, o)()
		defer n.serve(mirror, m)()
		c := newClient(t, n, registry.Config{HostsDir: dir})
		defer c.Close()
		img, err := c.Image(t.Context(), repo+":1", "")
		mustIs(t, err, nil)
		if img.Digest != want {
			t.Errorf("got %s, want %s", img.Digest, want)
		}
		if len(o.seen()) != 1 || len(m.seen()) != 1 { // tag at home, config at the mirror
			t.Errorf("%d requests to the registry, %d to the mirror", len(o.seen()), len(m.seen()))
		}
		_, err = c.Image(t.Context(), repo+":1", want)
		mustIs(t, err, nil)
		if len(o.seen()) != 1 {
			t.Error("the tag was looked up although the digest was given")
		}
	})
}

func TestHostsTomlIsReadAgain(t *testing.T) {
	dir := hostsDir(t, `server = "http://`+mirror+`"`)
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		o.addImage(t, "1", nil)
		n := newFakeNet()
		defer n.serve(home, o)()
		c := newClient(t, n, registry.Config{HostsDir: dir})
		defer c.Close()
		if _, err := c.Image(t.Context(), repo+":1", ""); err == nil {
			t.Fatal("resolved through a host that does not exist")
		}
		path := filepath.Join(dir, "127.0.0.1_5000_", "hosts.toml")
		if err := os.WriteFile(path, []byte(`server = "http://`+home+`" # now it does`), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := c.Image(t.Context(), repo+":1", "")
		mustIs(t, err, nil)
	})
}

func TestNoHostMayResolve(t *testing.T) {
	dir := hostsDir(t, `server = "http://`+home+"\"\ncapabilities = [\"pull\"]\n")
	c := newClient(t, newFakeNet(), registry.Config{HostsDir: dir})
	_, err := c.Image(t.Context(), repo+":1", "")
	mustIs(t, err, registry.ErrNotFound)
}
