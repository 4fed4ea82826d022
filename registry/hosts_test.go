package registry_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/registry"
)

// identity makes a key and a self-signed certificate and writes both.
func identity(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	mustIs(t, err, nil)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node"}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	mustIs(t, err, nil)
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	mustIs(t, err, nil)
	cert, key = filepath.Join(dir, "node.pem"), filepath.Join(dir, "node-key.pem")
	mustIs(t, os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600), nil)
	mustIs(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), 0o600), nil)
	return cert, key
}

// Every setting of hosts.toml counts for blobs as it does for containerd.
func TestHostsToml(t *testing.T) {
	o := newOrigin()
	l, want := o.addBlob(50_000)
	var paths, keys []string
	o.hook = func(w http.ResponseWriter, r *http.Request, _ int) bool {
		paths, keys = append(paths, r.URL.Path), append(keys, r.Header.Get("X-Key"))
		return false
	}
	srv := httptest.NewUnstartedServer(o)
	srv.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	srv.StartTLS()
	defer srv.Close()
	strict := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) == 0 || r.TLS.PeerCertificates[0].Subject.CommonName != "node" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		o.ServeHTTP(w, r)
	}))
	strict.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	strict.StartTLS()
	defer strict.Close()
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	mustIs(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600), nil)
	cert, key := identity(t, dir)
	var unknown *tls.CertificateVerificationError
	tests := []struct {
		name, toml string
		path       string
		fails      func(error) bool
	}{
		{"no ca", `server = "` + srv.URL + `"`, "", func(err error) bool { return errors.As(err, &unknown) }},
		{"ca", `server = "` + srv.URL + `"` + "\nca = \"" + ca + `"`, "/v2/lib/app/", nil},
		{"cas", `server = "` + srv.URL + `"` + "\nca = [\"" + ca + `"]`, "/v2/lib/app/", nil},
		{"skip_verify", `server = "` + srv.URL + `"` + "\nskip_verify = true", "/v2/lib/app/", nil},
		{"no client certificate", `server = "` + strict.URL + `"` + "\nca = \"" + ca + `"`, "",
			func(err error) bool { return errors.Is(err, registry.ErrUnauthorized) }},
		{"client certificate", `server = "` + strict.URL + `"` + "\nca = \"" + ca + "\"\nclient = [[\"" + cert + `", "` + key + `"]]`, "/v2/lib/app/", nil},
		{"path", `server = "` + srv.URL + `/prefix"` + "\nskip_verify = true", "/prefix/v2/lib/app/", nil},
		{"override_path", `server = "` + srv.URL + `/prefix"` + "\nskip_verify = true\noverride_path = true", "/prefix/lib/app/", nil},
		{"header", `server = "` + srv.URL + `"` + "\nskip_verify = true\n[header]\nX-Key = \"k\"", "/v2/lib/app/", nil},
		{"dial_timeout", `server = "` + srv.URL + `"` + "\nskip_verify = true\n[host.\"" + srv.URL + "/mirror\"]\nskip_verify = true\ndial_timeout = \"1ns\"",
			"/v2/lib/app/", nil},
		{"mirror that may not pull", `server = "` + srv.URL + `"` + "\nskip_verify = true\n[host.\"" + strict.URL + "\"]\ncapabilities = [\"resolve\"]", "/v2/lib/app/", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			paths, keys = nil, nil
			certs := filepath.Dir(filepath.Dir(writeFile(t, "registry.test/hosts.toml", tt.toml)))
			c := newClient(t, nil, registry.Config{HostsDir: certs, MaxRangeBytes: 1 << 20})
			defer c.Close()
			r, err := c.Open(t.Context(), "registry.test/lib/app:1", l)
			mustIs(t, err, nil)
			defer r.Close()
			var got bytes.Buffer
			_, err = got.ReadFrom(r)
			if tt.fails != nil {
				if err == nil || !tt.fails(err) {
					t.Fatalf("got %v", err)
				}
				return
			}
			mustIs(t, err, nil)
			if !bytes.Equal(got.Bytes(), want) {
				t.Error("wrong bytes")
			}
			if len(paths) != 1 || !strings.HasPrefix(paths[0], tt.path) {
				t.Errorf("asked for %q", paths)
			}
			if (tt.name == "header") != (keys[0] == "k") {
				t.Errorf("header %q", keys)
			}
		})
	}
}

// The variables of the environment are read once a process, so a process of its own pulls through the proxy.
func TestProxyFromEnvironment(t *testing.T) {
	const size = 300_000
	o := newOrigin()
	l, want := o.addBlob(size)
	if direct := os.Getenv("TEST_DIRECT"); direct != "" {
		certs := filepath.Dir(filepath.Dir(writeFile(t, "registry.test/hosts.toml", `server = "http://registry.test"`)))
		c := newClient(t, nil, registry.Config{HostsDir: certs, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr == "registry.test:80" {
				addr = direct
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		}})
		defer c.Close()
		r, err := c.Open(t.Context(), "registry.test/lib/app:1", l)
		mustIs(t, err, nil)
		defer r.Close()
		var got bytes.Buffer
		_, err = got.ReadFrom(r)
		mustIs(t, err, nil)
		if !bytes.Equal(got.Bytes(), want) {
			t.Error("wrong bytes")
		}
		return
	}
	var proxied atomic.Int32
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Host == "registry.test" { // as only a proxy is asked
			proxied.Add(1)
		}
		o.ServeHTTP(w, r)
	}))
	defer proxy.Close()
	direct := httptest.NewServer(o)
	defer direct.Close()
	for env, want := range map[string]bool{"HTTP_PROXY=" + proxy.URL: true, "NO_PROXY=registry.test": false} {
		proxied.Store(0)
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProxyFromEnvironment$", "-test.timeout=30s")
		cmd.Env = []string{"HOME=" + t.TempDir(), "TEST_DIRECT=" + direct.Listener.Addr().String(), "HTTP_PROXY=" + proxy.URL, env}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("with %s: %v\n%s", env, err, out)
		}
		if got := proxied.Load() > 0; got != want {
			t.Errorf("with %s: through the proxy is %v", env, got)
		}
	}
}
