package registry

import (
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func FuzzManifest(f *testing.F) {
	const d = `"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"`
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"digest":`+d+`,"size":1,"platform":{"os":"linux","architecture":"amd64","variant":"v1"}}]}`), "")
	f.Add([]byte(`{"config":{"mediaType":"application/vnd.docker.container.image.v1+json","digest":`+d+`,"size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":`+d+`,"size":3}]}`), "application/json; charset=utf-8")
	f.Add([]byte(`{"manifests":null,"layers":null,"config":null}`), dockerList)
	f.Add([]byte(`{"schemaVersion":1,"fsLayers":[]}`), "")
	f.Add([]byte(`{"manifests":[{"digest":"sha256:x","size":-1}]}`), "")
	f.Fuzz(func(t *testing.T, data []byte, contentType string) {
		m, err := parseManifest(data, contentType)
		if err != nil {
			return
		}
		if m.isIndex {
			if best, err := choosePlatform(m.index); err == nil && best.Digest.Validate() != nil {
				t.Fatalf("chose invalid %+v", best)
			}
			return
		}
		ids, err := parseConfig(data)
		if err != nil {
			return
		}
		layers, err := pairLayers(m.layers, ids)
		for _, l := range layers {
			if l.Size < 0 || l.Digest.Validate() != nil || l.DiffID.Validate() != nil {
				t.Fatalf("invalid layer %+v (%v)", l, err)
			}
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]}}`))
	f.Add([]byte(`{"rootfs":{"diff_ids":["sha512:x", ""]}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		ids, err := parseConfig(data)
		for _, id := range ids {
			if err == nil && id.Validate() != nil {
				t.Fatalf("accepted diffID %q", id)
			}
		}
	})
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-0/1", "bytes 5-9/*", "bytes */10", "bytes 9-5/10", "bytes 0-10/10",
		"bytes -1-2/3", "bytes 0-99999999999999999999/*", "items 0-1/2", "BYTES 1-2/3", "bytes +1-2/3", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseContentRange(s)
		if err == nil && (r.first < 0 || r.last < r.first || r.total < -1 || r.total >= 0 && r.last >= r.total) {
			t.Fatalf("%q: accepted %+v", s, r)
		}
	})
}

func FuzzDockerConfig(f *testing.F) {
	f.Add([]byte(`{"auths":{"https://index.docker.io/v1/":{"auth":"dTpw"}},"credsStore":"x"}`), "docker.io")
	f.Add([]byte(`{"auths":{"h:5000":{"identitytoken":"t"}},"credHelpers":{"h":"y"}}`), "h:5000")
	f.Add([]byte(`{"auths":{"h":{"auth":"Og=="}}}`), "h")
	f.Add([]byte(`{"auths":{"h":null},"credHelpers":null}`), "")
	f.Fuzz(func(t *testing.T, data []byte, host string) {
		cfg, err := parseDockerConfig(data)
		if err != nil || cfg.validate() != nil {
			return
		}
		keys := configKeys(host)
		cfg.helper(keys)
		for _, k := range keys {
			if _, err := cfg.Auths[k].credential(); err != nil {
				t.Fatalf("validated, but %v", err)
			}
		}
	})
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"7", "-5", "0", "99999999999999999999", "soon", "Sat, 01 Jan 2000 00:00:20 GMT", "Sat, 01 Jan 9999 00:00:20 GMT", ""} {
		f.Add(s)
	}
	now := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, s string) {
		if d := parseRetryAfter(s, now); d < 0 || d > 24*time.Hour {
			t.Fatalf("%q: %v", s, d)
		}
	})
}

func FuzzRedirectExpiry(f *testing.F) {
	f.Add("max-age=30, no-cache", "0", "X-Amz-Date=20260301T115950Z&X-Amz-Expires=60&se=2026-03-01T12%3A02%3A00Z")
	f.Add("private,,=,max-age", "Sun, 01 Mar 2026 12:01:00 GMT", "Expires=99999999999999")
	f.Add("max-age=\"99999999999\"", "", "X-Goog-Expires=2147483647&X-Goog-Date=99991231T235959Z&Expires=-1")
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, cache, expires, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		got := redirectExpiry(http.Header{"Cache-Control": {cache}, "Expires": {expires}}, q, now)
		if got.Before(now) || got.After(now.Add(keepRedirect)) {
			t.Fatalf("good until %v", got)
		}
	})
}

// A challenge is read by containerd's parser; what it makes of it must neither panic nor send anything by itself.
func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.test/token",service="s",scope="repository:a/b:pull"`)
	f.Add(`Basic realm="x"`)
	f.Add(`Bearer realm="\`)
	f.Add(`bearer realm=",error="invalid_token`)
	f.Add("Digest a=b, Bearer =\"\",,")
	nothing := roundTripper(func(*http.Request) (*http.Response, error) { panic("a request was sent") })
	f.Fuzz(func(t *testing.T, header string) {
		client := &http.Client{Transport: nothing}
		a := newAuthState(&keychain{}, "h/a", docker.RegistryHost{Client: client, Host: "h"})
		req := &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "https", Host: "h"}, Header: http.Header{}}
		used := a.current()
		resp := &http.Response{StatusCode: http.StatusUnauthorized, Request: req, Header: http.Header{"Www-Authenticate": {header}}}
		err := a.challenge(t.Context(), used, resp)
		if now := a.current(); err != nil && now.Authorizer != nil {
			t.Fatalf("%q: refused (%v), but kept", header, err)
		}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func FuzzSiblings(f *testing.F) {
	const d = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	f.Add([]byte(`{"subject":{"digest":"` + d + `"},"annotations":{"dev.hearth.encoding":"zstd"},"layers":[{"digest":"` + d + `","size":1,"annotations":{` +
		`"dev.hearth.layer.digest":"` + d + `","dev.hearth.layer.diffid":"` + d + `","dev.hearth.layer.bytes":"1","dev.hearth.layer.frame-bytes":"1"}}]}`))
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"digest":"` + d + `","size":1,"artifactType":"` + siblingType + `"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, s := range parseSiblings(data, d) {
			if s.Digest.Validate() != nil || s.DiffID.Validate() != nil || s.Original.Validate() != nil || s.Size <= 0 || s.Bytes <= 0 || s.FrameBytes <= 0 {
				t.Fatalf("invalid sibling %+v", s)
			}
		}
		if all, err := parseReferrers(data); err == nil && validateAll(all...) != nil {
			t.Fatalf("invalid referrers %+v", all)
		}
	})
}

func FuzzNextPage(f *testing.F) {
	f.Add(`</v2/a/referrers/sha256:1?n=10&last=x>; rel="next"`)
	f.Add(`<https://h/first?p=0>; rel="first", </v2/a?p=2> ; REL = "last next" ; title="<"`)
	f.Add(`<?>; rel=next`)
	f.Add(`<?a=%zz&;>;rel=next,<`)
	f.Add(`<<<>>>;;;===,,,`)
	f.Fuzz(func(t *testing.T, link string) {
		if q := nextPage([]string{link}); q != nil && len(link) > maxLinkBytes {
			t.Fatalf("follows a link of %d bytes", len(link))
		}
	})
}

func FuzzProfileArtifact(f *testing.F) {
	const d = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	f.Add([]byte(`{"subject":{"digest":"`+d+`"},"annotations":{"org.opencontainers.image.created":"2026-01-01T00:00:00Z","dev.hearth.profile.starts":"3"},`+
		`"layers":[{"mediaType":"`+profileType+`","digest":"`+d+`","size":1}]}`), "2026-01-01T00:00:00Z")
	f.Add([]byte(`{"subject":{},"layers":[{"size":-1}]}`), "9999-12-31T23:59:59Z")
	f.Fuzz(func(t *testing.T, data []byte, created string) {
		p, blob, ok := parseProfile(data, d)
		if ok && (blob.Digest.Validate() != nil || blob.Size <= 0 || blob.Size > MaxProfileBytes || p.Starts <= 0 || len(p.Node) > 253) {
			t.Fatalf("accepted %+v in %+v", p, blob)
		}
		list := []ocispec.Descriptor{{Digest: "1"}, {Digest: "2", Annotations: map[string]string{ocispec.AnnotationCreated: created}}}
		if newestFirst(list, time.Unix(0, 0)); len(list) != 2 || list[0].Digest == list[1].Digest {
			t.Fatalf("%q: sorted to %+v", created, list)
		}
	})
}
