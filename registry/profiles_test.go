package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hearth-serverless/hearth/registry"
)

const profileType = "application/vnd.hearth.profile.v2"

func profileOf(node string, created time.Time) registry.Profile {
	return registry.Profile{Data: []byte("what starts read on " + node), Created: created, Starts: 3, Platform: "linux/amd64", Node: node}
}

func TestProfiles(t *testing.T) {
	for _, api := range []bool{true, false} {
		t.Run(fmt.Sprintf("referrers API %v", api), func(t *testing.T) {
			_, c, img := serveForeign(t, api)
			if got, err := c.Profiles(t.Context(), img.Ref, img.Digest); err != nil || len(got) != 0 {
				t.Fatalf("before: %v, error %v", got, err)
			}
			if err := c.AttachSiblings(t.Context(), img, "zstd", []registry.Sibling{sibling(t, c, img, "zstd", "another artifact")}); err != nil {
				t.Fatal(err)
			}
			day := func(n int) time.Time { return time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC) }
			for _, n := range []int{3, 1, 4, 2, 5, 1} { // the last one is there already
				if err := c.AttachProfile(t.Context(), img, profileOf(fmt.Sprintf("node-%d", n), day(n))); err != nil {
					t.Fatal(err)
				}
			}
			want := []registry.Profile{profileOf("node-5", day(5)), profileOf("node-4", day(4)), profileOf("node-3", day(3)), profileOf("node-2", day(2))}
			got, err := c.Profiles(t.Context(), img.Ref, img.Digest)
			if diff := cmp.Diff(want, got); err != nil || diff != "" {
				t.Errorf("error %v, profiles %s", err, diff)
			}
			if list, err := c.Siblings(t.Context(), img.Ref, img.Digest); err != nil || len(list) != 1 {
				t.Errorf("siblings %v, error %v", list, err)
			}
			again, err := c.Image(t.Context(), img.Ref, "")
			if diff := cmp.Diff(img, again); err != nil || diff != "" {
				t.Errorf("the image changed: %v %s", err, diff)
			}
		})
	}
}

func TestProfileThatCannotBe(t *testing.T) {
	_, c, img := serveForeign(t, true)
	for name, change := range map[string]func(*registry.Profile){
		"empty":     func(p *registry.Profile) { p.Data = nil },
		"too large": func(p *registry.Profile) { p.Data = make([]byte, registry.MaxProfileBytes+1) },
		"no starts": func(p *registry.Profile) { p.Starts = 0 },
	} {
		p := profileOf("node", time.Unix(0, 0))
		change(&p)
		if err := c.AttachProfile(t.Context(), img, p); !errors.Is(err, registry.ErrSize) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// TestProfilesAtOnce has nodes that write the list under the tag at the same time.
func TestProfilesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, c := newFakeNet(), make([]*registry.Client, 4)
		defer n.serve(home, ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(false)))()
		for i := range c {
			c[i] = newClient(t, n, registry.Config{})
			defer c[i].Close()
		}
		img := pushImage(t, c[0], repo+":1")
		var nodes sync.WaitGroup
		for i := range c {
			nodes.Go(func() {
				p := profileOf(fmt.Sprintf("node-%d", i), time.Now())
				if err := c[i].AttachProfile(t.Context(), img, p); err != nil {
					t.Errorf("node %d: %v", i, err)
				}
			})
		}
		nodes.Wait()
		if got, err := c[0].Profiles(t.Context(), img.Ref, img.Digest); err != nil || len(got) != len(c) {
			t.Errorf("%d profiles are left of %d, error %v", len(got), len(c), err)
		}
	})
}

// TestProfilesBeyondBound has more profiles of an image than a list under a tag keeps: the oldest go.
func TestProfilesBeyondBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		defer n.serve(home, ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(false)))()
		c := newClient(t, n, registry.Config{})
		defer c.Close()
		img := pushImage(t, c, repo+":1")
		for i := range 70 {
			mustIs(t, c.AttachProfile(t.Context(), img, profileOf(fmt.Sprintf("node-%d", i), time.Now())), nil)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+home+"/v2/lib/app/manifests/sha256-"+img.Digest.Encoded(), nil)
		mustIs(t, err, nil)
		client := &http.Client{Transport: &http.Transport{DialContext: n.dial, DisableKeepAlives: true}}
		resp, err := client.Do(req)
		mustIs(t, err, nil)
		data, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		mustIs(t, err, nil)
		if got := strings.Count(string(data), `"artifactType"`); got != 64 || strings.Contains(string(data), `"node-5"`) || !strings.Contains(string(data), `"node-69"`) {
			t.Errorf("%d profiles in the list: %.300s", got, data)
		}
	})
}

// pushImage pushes an image of one layer.
func pushImage(t *testing.T, c *registry.Client, ref string) *registry.Image {
	t.Helper()
	o := newOrigin()
	o.addImage(t, "1", nil)
	for dgst, data := range o.blobs {
		if _, err := c.PutBlob(t.Context(), ref, ocispec.Descriptor{Digest: digest.Digest(dgst), Size: int64(len(data))}, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
	}
	mustIs(t, c.PutManifest(t.Context(), ref, ociManifest, o.manifests["1"]), nil)
	img, err := c.Image(t.Context(), ref, "")
	mustIs(t, err, nil)
	return img
}

// TestHostileProfiles has lists, manifests and blobs that lie: what cannot be used is left out or is an error, whatever its size.
func TestHostileProfiles(t *testing.T) {
	rec, c, img := serveForeign(t, true)
	good := profileOf("good", time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	if err := c.AttachProfile(t.Context(), img, good); err != nil {
		t.Fatal(err)
	}
	base := "http://" + strings.Split(img.Ref, "/")[0] + "/v2/lib/app/manifests/"
	blob := desc(profileType, good.Data)
	artifact := func(change func(m object, layer object)) object {
		layer := object{"mediaType": profileType, "digest": blob["digest"], "size": blob["size"]}
		m := object{"schemaVersion": 2, "mediaType": ociManifest, "artifactType": profileType, "config": desc(profileType, []byte("{}")),
			"subject": object{"digest": img.Digest, "size": 1, "mediaType": "x"}, "layers": []object{layer}, "annotations": object{
				"org.opencontainers.image.created": "2026-01-01T00:00:00Z", "dev.hearth.profile.starts": "3", "dev.hearth.profile.node": "good", "dev.hearth.profile.platform": "linux/amd64"}}
		change(m, layer)
		data := encode(t, m)
		put(t, base+digest.FromBytes(data).String(), ociManifest, data)
		d := desc(ociManifest, data)
		d["artifactType"] = profileType
		return d
	}
	annotate := func(key string, value any) object {
		return artifact(func(m, _ object) { m["annotations"].(object)[key] = value })
	}
	fine := artifact(func(object, object) {})
	future := object{"annotations": object{"org.opencontainers.image.created": "9999-01-01T00:00:00Z"}}
	for k, v := range fine {
		future[k] = v
	}
	absent := object{"digest": digest.FromString("?"), "size": 5, "artifactType": profileType}
	tests := map[string]struct {
		list  any
		found int
		err   error
	}{
		"fine":                 {[]object{fine}, 1, nil},
		"another type":         {[]object{{"digest": fine["digest"], "size": fine["size"], "artifactType": accelerated}}, 0, nil},
		"no list":              {5, 0, registry.ErrProtocol},
		"a large manifest":     {[]object{{"digest": fine["digest"], "size": 1 << 30, "artifactType": profileType}}, 0, registry.ErrSize},
		"missing":              {[]object{absent}, 0, registry.ErrNotFound},
		"missing and fine":     {[]object{absent, fine}, 1, nil},
		"missing, many":        {[]object{absent, absent, absent, absent, fine}, 0, registry.ErrNotFound},
		"many":                 {[]object{fine, fine, fine, fine, fine, fine, fine, fine}, 4, nil},
		"of the future":        {[]object{future}, 1, nil},
		"another subject":      {[]object{artifact(func(m, _ object) { m["subject"].(object)["digest"] = digest.FromString("?") })}, 0, nil},
		"no subject":           {[]object{artifact(func(m, _ object) { delete(m, "subject") })}, 0, nil},
		"no layer":             {[]object{artifact(func(m, _ object) { m["layers"] = []object{} })}, 0, nil},
		"layers by the dozen":  {[]object{artifact(func(m, l object) { m["layers"] = []object{l, l, l} })}, 0, nil},
		"another media type":   {[]object{artifact(func(_, l object) { l["mediaType"] = ociLayer })}, 0, nil},
		"a large blob":         {[]object{artifact(func(_, l object) { l["size"] = 1 << 40 })}, 0, nil},
		"an empty blob":        {[]object{artifact(func(_, l object) { l["size"] = 0 })}, 0, nil},
		"a blob of wrong size": {[]object{artifact(func(_, l object) { l["size"] = 5 })}, 0, registry.ErrSize},
		"a missing blob":       {[]object{artifact(func(_, l object) { l["digest"] = digest.FromString("?") })}, 0, registry.ErrNotFound},
		"no starts":            {[]object{annotate("dev.hearth.profile.starts", "")}, 0, nil},
		"negative starts":      {[]object{annotate("dev.hearth.profile.starts", "-3")}, 0, nil},
		"no time":              {[]object{annotate("org.opencontainers.image.created", "yesterday")}, 0, nil},
		"a long name":          {[]object{annotate("dev.hearth.profile.node", strings.Repeat("x", 1000))}, 0, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			rec.mu.Lock()
			rec.hook = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/referrers/") {
					return false
				}
				_, _ = w.Write(encode(t, object{"schemaVersion": 2, "manifests": tt.list}))
				return true
			}
			rec.mu.Unlock()
			got, err := c.Profiles(t.Context(), img.Ref, img.Digest)
			mustIs(t, err, tt.err)
			if len(got) != tt.found {
				t.Errorf("found %d profiles, want %d", len(got), tt.found)
			}
		})
	}
	t.Run("a blob without end", func(t *testing.T) {
		rec.mu.Lock()
		rec.hook = func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/referrers/") { // the registry's own has what lies above, too
				_, _ = w.Write(encode(t, object{"schemaVersion": 2, "manifests": []object{fine}}))
				return true
			}
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			for range 64 {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					break
				}
			}
			return true
		}
		rec.mu.Unlock()
		_, err := c.Profiles(t.Context(), img.Ref, img.Digest)
		mustIs(t, err, registry.ErrSize)
	})
}
