package registry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hearth-serverless/hearth/registry"
)

const accelerated = "application/vnd.hearth.accelerated.v1+json"

// recorder is a registry of another hand, with what was asked of it.
type recorder struct {
	http.Handler
	mu       sync.Mutex
	requests []string
	hook     func(w http.ResponseWriter, r *http.Request) bool
}

func (rec *recorder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rec.mu.Lock()
	rec.requests = append(rec.requests, r.Method+" "+r.URL.Path)
	hook := rec.hook
	rec.mu.Unlock()
	if hook == nil || !hook(w, r) {
		rec.Handler.ServeHTTP(w, r)
	}
}

func (rec *recorder) count(prefix string) int {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	n := 0
	for _, r := range rec.requests {
		if strings.HasPrefix(r, prefix) {
			n++
		}
	}
	return n
}

// serve starts a registry and pushes an image of one layer to it.
func serveForeign(t *testing.T, referrersAPI bool) (*recorder, *registry.Client, *registry.Image) {
	t.Helper()
	rec := &recorder{Handler: ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(referrersAPI))}
	server := httptest.NewServer(rec)
	t.Cleanup(server.Close)
	c := newClient(t, nil, registry.Config{})
	t.Cleanup(c.Close)
	ref := strings.TrimPrefix(server.URL, "http://") + "/lib/app:1"
	o := newOrigin()
	o.addImage(t, "1", nil)
	for dgst, data := range o.blobs {
		if _, err := c.PutBlob(t.Context(), ref, ocispec.Descriptor{Digest: digest.Digest(dgst), Size: int64(len(data))}, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
	}
	put(t, server.URL+"/v2/lib/app/manifests/1", ociManifest, o.manifests["1"])
	img, err := c.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	return rec, c, img
}

func put(t *testing.T, url, mediaType string, data []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, url, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		t.Fatalf("put %s: %s", url, resp.Status)
	}
}

// sibling pushes a blob and describes it as a sibling of the image's layer.
func sibling(t *testing.T, c *registry.Client, img *registry.Image, encoding, content string) registry.Sibling {
	t.Helper()
	desc := ocispec.Descriptor{Digest: digest.FromString(content), Size: int64(len(content))}
	if existed, err := c.PutBlob(t.Context(), img.Ref, desc, strings.NewReader(content)); err != nil || existed {
		t.Fatalf("push: existed %v, error %v", existed, err)
	}
	if existed, err := c.PutBlob(t.Context(), img.Ref, desc, strings.NewReader(content)); err != nil || !existed {
		t.Fatalf("push again: existed %v, error %v", existed, err)
	}
	l := img.Layers[0]
	return registry.Sibling{
		Layer:    registry.Layer{Digest: desc.Digest, DiffID: l.DiffID, Size: desc.Size, MediaType: registry.SiblingMediaType(encoding)},
		Original: l.Digest, Encoding: encoding, Bytes: 1000, FrameBytes: 512 << 10,
	}
}

func TestSiblings(t *testing.T) {
	for _, api := range []bool{true, false} {
		t.Run(fmt.Sprintf("referrers API %v", api), func(t *testing.T) {
			rec, c, img := serveForeign(t, api)
			if got, err := c.Siblings(t.Context(), img.Ref, img.Digest); err != nil || len(got) != 0 {
				t.Fatalf("before: %v, error %v", got, err)
			}
			want := map[string]registry.Sibling{}
			for range 2 { // the second time changes nothing
				for _, e := range []string{"zstd", "lz4"} {
					if _, ok := want[e]; !ok {
						want[e] = sibling(t, c, img, e, "layer in "+e)
					}
					if err := c.AttachSiblings(t.Context(), img, e, []registry.Sibling{want[e]}); err != nil {
						t.Fatal(err)
					}
				}
			}
			list, err := c.Siblings(t.Context(), img.Ref, img.Digest)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]registry.Sibling{}
			for _, s := range list {
				got[s.Encoding] = s
			}
			if diff := cmp.Diff(want, got); diff != "" || len(list) != 2 {
				t.Errorf("%d siblings: %s", len(list), diff)
			}
			again, err := c.Image(t.Context(), img.Ref, "")
			if diff := cmp.Diff(img, again); err != nil || diff != "" {
				t.Errorf("the image changed: %v %s", err, diff)
			}
			tag := "PUT /v2/lib/app/manifests/sha256-" + img.Digest.Encoded()
			if n := rec.count(tag); api != (n == 0) {
				t.Errorf("%d lists put under the tag", n)
			}
		})
	}
}

// TestHostileReferrers has lists and artifacts that lie: what cannot be used is left out or is an error, and there is no panic.
func TestHostileReferrers(t *testing.T) {
	rec, c, img := serveForeign(t, true)
	good := sibling(t, c, img, "zstd", "good")
	if err := c.AttachSiblings(t.Context(), img, "zstd", []registry.Sibling{good}); err != nil {
		t.Fatal(err)
	}
	artifact := func(change func(m map[string]any, layer map[string]any)) object {
		layer := object{"mediaType": "x", "digest": good.Digest, "size": good.Size, "annotations": object{
			"dev.hearth.layer.digest": good.Original, "dev.hearth.layer.diffid": good.DiffID, "dev.hearth.layer.bytes": "10", "dev.hearth.layer.frame-bytes": "10"}}
		m := object{"schemaVersion": 2, "mediaType": ociManifest, "artifactType": accelerated, "config": desc(accelerated, []byte("{}")),
			"subject": object{"digest": img.Digest, "size": 1, "mediaType": "x"}, "annotations": object{"dev.hearth.encoding": "zstd"}, "layers": []object{layer}}
		change(m, layer)
		data := encode(t, m)
		put(t, "http://"+strings.Split(img.Ref, "/")[0]+"/v2/lib/app/manifests/"+digest.FromBytes(data).String(), ociManifest, data)
		d := desc(ociManifest, data)
		d["artifactType"] = accelerated
		return d
	}
	annotate := func(key string, value any) object {
		return artifact(func(_, l map[string]any) { l["annotations"].(object)[key] = value })
	}
	fine := artifact(func(map[string]any, map[string]any) {})
	lists := map[string]struct {
		list  any
		found int
		err   error
	}{
		"fine":               {[]object{fine}, 1, nil},
		"empty":              {[]object{}, 0, nil},
		"no list":            {"x", 0, registry.ErrProtocol},
		"another type":       {[]object{{"mediaType": ociManifest, "digest": fine["digest"], "size": fine["size"], "artifactType": "a/b"}}, 0, nil},
		"bad digest":         {[]object{{"digest": "sha256:nonsense", "artifactType": accelerated}}, 0, registry.ErrProtocol},
		"negative size":      {[]object{{"digest": fine["digest"], "size": -1, "artifactType": accelerated}}, 0, registry.ErrSize},
		"wrong size":         {[]object{{"digest": fine["digest"], "size": 5, "artifactType": accelerated}}, 0, registry.ErrSize},
		"missing":            {[]object{{"digest": digest.FromString("?"), "size": 5, "artifactType": accelerated}}, 0, registry.ErrNotFound},
		"missing and fine":   {[]object{{"digest": digest.FromString("?"), "size": 5, "artifactType": accelerated}, fine}, 1, nil},
		"another subject":    {[]object{artifact(func(m, _ map[string]any) { m["subject"].(object)["digest"] = digest.FromString("?") })}, 0, nil},
		"no subject":         {[]object{artifact(func(m, _ map[string]any) { delete(m, "subject") })}, 0, nil},
		"no encoding":        {[]object{artifact(func(m, _ map[string]any) { delete(m, "annotations") })}, 0, nil},
		"layer of no digest": {[]object{artifact(func(_, l map[string]any) { l["digest"] = "?" })}, 0, nil},
		"empty layer":        {[]object{artifact(func(_, l map[string]any) { l["size"] = 0 })}, 0, nil},
		"no diffID":          {[]object{annotate("dev.hearth.layer.diffid", "")}, 0, nil},
		"no original":        {[]object{annotate("dev.hearth.layer.digest", "../../x")}, 0, nil},
		"negative bytes":     {[]object{annotate("dev.hearth.layer.bytes", "-1")}, 0, nil},
		"huge bytes":         {[]object{annotate("dev.hearth.layer.bytes", "99999999999999999999")}, 0, nil},
		"no frame size":      {[]object{annotate("dev.hearth.layer.frame-bytes", "x")}, 0, nil},
		"annotation no text": {[]object{annotate("dev.hearth.layer.bytes", 5)}, 0, nil},
		"many":               {[]object{fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine, fine}, 16, nil},
	}
	for name, tt := range lists {
		t.Run(name, func(t *testing.T) {
			rec.mu.Lock()
			rec.hook = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/referrers/") {
					return false
				}
				if r.URL.Query().Get("artifactType") != accelerated {
					t.Errorf("asks for %q", r.URL)
				}
				_, _ = w.Write(encode(t, object{"schemaVersion": 2, "manifests": tt.list}))
				return true
			}
			rec.mu.Unlock()
			got, err := c.Siblings(t.Context(), img.Ref, img.Digest)
			mustIs(t, err, tt.err)
			if len(got) != tt.found {
				t.Errorf("found %d siblings, want %d", len(got), tt.found)
			}
		})
	}
}

// TestReferrersHavePages has a registry that lists referrers of all types, three at a time.
func TestReferrersHavePages(t *testing.T) {
	rec, c, img := serveForeign(t, true)
	good := sibling(t, c, img, "zstd", "good")
	if err := c.AttachSiblings(t.Context(), img, "zstd", []registry.Sibling{good}); err != nil {
		t.Fatal(err)
	}
	var all struct{ Manifests []json.RawMessage }
	resp, err := http.Get("http://" + strings.Split(img.Ref, "/")[0] + "/v2/lib/app/referrers/" + img.Digest.String())
	mustIs(t, err, nil)
	mustIs(t, json.NewDecoder(resp.Body).Decode(&all), nil)
	resp.Body.Close()
	if len(all.Manifests) != 1 {
		t.Fatalf("%d referrers", len(all.Manifests))
	}
	other := encode(t, object{"mediaType": ociManifest, "digest": digest.FromString("signature"), "size": 5, "artifactType": "a/signature"})
	tests := map[string]struct {
		before int    // referrers of others
		link   string // to page %d
		found  int
		pages  int
	}{
		"one page":                {2, `</v2/lib/app/referrers/x?page=%d>; rel="next"`, 1, 1},
		"on the third":            {7, `</v2/lib/app/referrers/x?page=%d>; rel="next"`, 1, 3},
		"a proxy in between":      {7, `<https://elsewhere.example/v2/?page=%d&artifactType=>; title=x ;REL=next`, 1, 3},
		"several relations":       {7, `<?page=0>; rel="first", <?page=%d>; rel="up next"`, 1, 3},
		"no query":                {7, `</v2/next>; rel="next"; n=%d`, 0, 1},
		"another relation":        {7, `<?page=%d>; rel="last"`, 0, 1},
		"a link that is too long": {7, `<?page=%d&x=` + strings.Repeat("x", 5000) + `>; rel="next"`, 0, 1},
		"without end":             {1000, `<?page=%d>; rel="next"`, 0, 32},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			pages := 0
			rec.mu.Lock()
			rec.hook = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/referrers/"+img.Digest.String()) {
					if strings.Contains(r.URL.Path, "referrers") {
						t.Errorf("asks for %s", r.URL.Path)
					}
					return false
				}
				pages++
				if r.URL.Query().Get("artifactType") != accelerated {
					t.Errorf("asks for %q", r.URL)
				}
				page := 0
				fmt.Sscan(r.URL.Query().Get("page"), &page)
				var list []json.RawMessage
				for i := page * 3; i < page*3+3 && i <= tt.before; i++ {
					if i == tt.before {
						list = append(list, all.Manifests[0])
					} else {
						list = append(list, other)
					}
				}
				if page*3+3 <= tt.before {
					w.Header().Set("Link", fmt.Sprintf(tt.link, page+1))
				}
				_, _ = w.Write(encode(t, object{"schemaVersion": 2, "manifests": list}))
				return true
			}
			rec.mu.Unlock()
			got, err := c.Siblings(t.Context(), img.Ref, img.Digest)
			mustIs(t, err, nil)
			if len(got) != tt.found || pages != tt.pages {
				t.Errorf("found %d siblings on %d pages, want %d on %d", len(got), pages, tt.found, tt.pages)
			}
		})
	}
}

// TestPushAnswers has registries that answer pushes in ways of their own.
func TestPushAnswers(t *testing.T) {
	content := "content of a blob"
	blob := ocispec.Descriptor{Digest: digest.FromString(content), Size: int64(len(content))}
	upload := func(location string) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				w.Header().Set("Location", location)
				w.WriteHeader(http.StatusAccepted)
			}
			return r.Method == http.MethodPost
		}
	}
	failed := 0
	tests := map[string]struct {
		hook func(w http.ResponseWriter, r *http.Request) bool
		err  error
	}{
		"no place":     {upload(""), registry.ErrProtocol},
		"worse scheme": {upload("ftp://127.0.0.1/x"), registry.ErrProtocol},
		"has it with another size": {func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", "3")
			return r.Method == http.MethodHead
		}, registry.ErrSize},
		"refused": {func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(http.StatusForbidden)
			return true
		}, registry.ErrUnauthorized},
		"fails once in mid-body": {func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPut || failed > 0 {
				return false
			}
			failed++
			_, _ = io.CopyN(io.Discard, r.Body, 3)
			w.WriteHeader(http.StatusBadGateway)
			return true
		}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			rec, c, img := serveForeign(t, true)
			rec.mu.Lock()
			rec.hook = tt.hook
			rec.mu.Unlock()
			_, err := c.PutBlob(t.Context(), img.Ref, blob, strings.NewReader(content))
			mustIs(t, err, tt.err)
		})
	}
}

// TestPushWithToken has a registry whose tokens say what they are good for, and an upload that leads elsewhere.
func TestPushWithToken(t *testing.T) {
	content := "content of a blob"
	var elsewhere *httptest.Server
	stored := ""
	mux := http.NewServeMux()
	server := httptest.NewServer(mux)
	defer server.Close()
	elsewhere = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials went to another host")
		}
		if r.URL.Query().Get("signature") != "s" || r.URL.Query().Get("digest") != digest.FromString(content).String() {
			t.Errorf("uploads to %s", r.URL)
		}
		data, _ := io.ReadAll(r.Body)
		stored = string(data)
		w.WriteHeader(http.StatusCreated)
	}))
	defer elsewhere.Close()
	mux.HandleFunc("/token", func(w http.ResponseWriter, r *http.Request) {
		if user, pass, _ := r.BasicAuth(); user != "me" || pass != "secret" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_ = json.NewEncoder(w).Encode(object{"token": r.URL.Query().Get("scope"), "expires_in": 300})
	})
	mux.HandleFunc("/v2/", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer repository:lib/app:pull,push" {
			w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s"`, server.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if r.Method == http.MethodPost {
			w.Header().Set("Location", elsewhere.URL+"/up?signature=s")
			w.WriteHeader(http.StatusAccepted)
			return
		}
		w.WriteHeader(http.StatusNotFound)
	})
	host := strings.TrimPrefix(server.URL, "http://")
	cfg := writeFile(t, "config.json", fmt.Sprintf(`{"auths":{%q:{"username":"me","password":"secret"}}}`, host))
	c := newClient(t, nil, registry.Config{DockerConfig: cfg})
	defer c.Close()
	blob := ocispec.Descriptor{Digest: digest.FromString(content), Size: int64(len(content))}
	if _, err := c.PutBlob(t.Context(), host+"/lib/app:1", blob, strings.NewReader(content)); err != nil || stored != content {
		t.Errorf("stored %q, error %v", stored, err)
	}
}
