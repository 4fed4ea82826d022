package registry_test

import (
	"bytes"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/registry"
)

func platform(os, arch string) object { return object{"os": os, "architecture": arch} }

// indexEntry is an image under a tag of the origin's.
type indexEntry struct {
	platform object
	of       string
}

// index serves a list of images under the tag 1.
func index(t *testing.T, o *origin, entries ...indexEntry) digest.Digest {
	t.Helper()
	var list []object
	for _, e := range entries {
		d := desc(ociManifest, o.manifests[e.of])
		if e.platform != nil {
			d["platform"] = e.platform
		}
		list = append(list, d)
	}
	return o.addManifest("1", encode(t, object{"schemaVersion": 2, "mediaType": ociIndex, "manifests": list}))
}

func TestImage(t *testing.T) {
	layerType := func(mediaType string) func(object) {
		return func(m object) { m["layers"].([]object)[0]["mediaType"] = mediaType }
	}
	tests := []struct {
		name  string
		setup func(t *testing.T, o *origin) (ask digest.Digest)
		want  string // tag of the manifest that is chosen
		err   error
	}{
		{"manifest", func(t *testing.T, o *origin) digest.Digest { o.addImage(t, "1", nil); return "" }, "1", nil},
		{"docker manifest", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", func(m object) {
				m["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json"
				m["config"].(object)["mediaType"] = "application/vnd.docker.container.image.v1+json"
				layerType("application/vnd.docker.image.rootfs.diff.tar.gzip")(m)
			})
			return ""
		}, "1", nil},
		{"manifest that does not say what it is", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", func(m object) { delete(m, "mediaType") })
			return ""
		}, "1", nil},
		{"zstd", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", layerType("application/vnd.oci.image.layer.v1.tar+zstd"))
			return ""
		}, "1", nil},
		{"lz4", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", layerType("application/vnd.oci.image.layer.v1.tar+lz4"))
			return ""
		}, "1", nil},
		{"index", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "other", func(m object) { m["annotations"] = object{"a": "other"} })
			o.addImage(t, "ours", nil)
			index(t, o, indexEntry{platform("linux", "s390x"), "other"},
				indexEntry{platform("unknown", "unknown"), "other"}, indexEntry{platform("linux", runtime.GOARCH), "ours"})
			return ""
		}, "ours", nil},
		{"index by digest", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "ours", nil)
			d := index(t, o, indexEntry{platform("linux", runtime.GOARCH), "ours"})
			delete(o.manifests, "1")
			return d
		}, "ours", nil},
		{"index without platforms", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "ours", nil)
			index(t, o, indexEntry{nil, "ours"})
			return ""
		}, "ours", nil},
		{"no such platform", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "other", nil)
			index(t, o, indexEntry{platform("windows", runtime.GOARCH), "other"})
			return ""
		}, "", registry.ErrUnsupported},
		{"foreign layer", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", layerType("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"))
			return ""
		}, "", registry.ErrUnsupported},
		{"nondistributable layer", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", layerType("application/vnd.oci.image.layer.nondistributable.v1.tar"))
			return ""
		}, "", registry.ErrUnsupported},
		{"layer that is none", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", layerType("application/vnd.in-toto+json"))
			return ""
		}, "", registry.ErrUnsupported},
		{"artifact", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", func(m object) { m["config"].(object)["mediaType"] = "application/vnd.oci.empty.v1+json" })
			return ""
		}, "", registry.ErrUnsupported},
		{"schema 1", func(t *testing.T, o *origin) digest.Digest {
			o.addManifest("1", []byte(`{"schemaVersion":1,"fsLayers":[]}`))
			return ""
		}, "", registry.ErrUnsupported},
		{"index and manifest at once", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", func(m object) { m["manifests"] = []object{} })
			return ""
		}, "", registry.ErrUnsupported},
		{"negative size", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", func(m object) { m["layers"].([]object)[0]["size"] = -1 })
			return ""
		}, "", registry.ErrSize},
		{"broken digest", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", func(m object) { m["layers"].([]object)[0]["digest"] = "sha256:../../x" })
			return ""
		}, "", registry.ErrProtocol},
		{"layers without diffIDs", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", func(m object) { l := m["layers"].([]object); m["layers"] = append(l, l[0]) })
			return ""
		}, "", registry.ErrProtocol},
		{"manifest of another digest", func(t *testing.T, o *origin) digest.Digest {
			d := o.addImage(t, "1", nil)
			o.manifests[d.String()] = append(o.manifests[d.String()], ' ')
			return d
		}, "", registry.ErrDigest},
		{"config of another digest", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", nil)
			for d, data := range o.blobs {
				o.blobs[d] = bytes.ToUpper(data)
			}
			return ""
		}, "", registry.ErrDigest},
		{"huge config", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", func(m object) { m["config"].(object)["size"] = 9 << 20 })
			return ""
		}, "", registry.ErrSize},
		{"endless manifest", func(t *testing.T, o *origin) digest.Digest {
			o.addManifest("1", []byte(`{"x":"`+strings.Repeat("x", 5<<20)+`"}`))
			return ""
		}, "", registry.ErrSize},
		{"index that never ends", func(t *testing.T, o *origin) digest.Digest {
			o.addImage(t, "1", nil)
			for range 8 {
				index(t, o, indexEntry{platform("linux", runtime.GOARCH), "1"})
			}
			return ""
		}, "", registry.ErrUnsupported},
		{"absent", func(t *testing.T, o *origin) digest.Digest { return "" }, "", registry.ErrNotFound},
		{"invalid digest", func(t *testing.T, o *origin) digest.Digest { return "sha256:12" }, "", digest.ErrDigestInvalidLength},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOrigin()
				ask := tt.setup(t, o)
				n := newFakeNet()
				defer n.serve(home, o)()
				c := newClient(t, n, registry.Config{})
				defer c.Close()
				img, err := c.Image(t.Context(), repo+":1", ask)
				mustIs(t, err, tt.err)
				if err != nil {
					if !strings.Contains(err.Error(), repo+":1") {
						t.Errorf("error does not name the image: %v", err)
					}
					return
				}
				if want := digest.FromBytes(o.manifests[tt.want]); img.Digest != want || len(img.Layers) != 1 || img.Layers[0].Size != 1000 {
					t.Errorf("got %+v, want manifest %s", img, want)
				}
			})
		})
	}
}

// A manifest that breaks off or is refused for a while is fetched again.
func TestImageIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOrigin()
		o.addImage(t, "1", nil)
		o.hook = func(w http.ResponseWriter, r *http.Request, n int) bool {
			switch n {
			case 1:
				w.WriteHeader(http.StatusServiceUnavailable)
				return true
			case 2:
				w.Header().Set("Content-Length", "500")
				w.Write([]byte("{"))
				panic(http.ErrAbortHandler)
			}
			return false
		}
		n := newFakeNet()
		defer n.serve(home, o)()
		c := newClient(t, n, registry.Config{})
		defer c.Close()
		_, err := c.Image(t.Context(), repo+":1", "")
		mustIs(t, err, nil)
	})
}

func TestBadReferences(t *testing.T) {
	c := newClient(t, newFakeNet(), registry.Config{})
	for _, ref := range []string{"", "http://x/y", "a b", "x@sha256:1", home + "/../x:1", home + "/UPPER"} {
		if _, err := c.Image(t.Context(), ref, ""); err == nil {
			t.Errorf("%q is accepted", ref)
		}
		if _, err := c.Open(t.Context(), ref, registry.Layer{Digest: digest.FromString("x")}); err == nil {
			t.Errorf("%q is accepted by Open", ref)
		}
	}
	_, err := c.Open(t.Context(), repo, registry.Layer{Digest: digest.FromString("x"), Size: -1})
	mustIs(t, err, registry.ErrSize)
	_, err = c.Open(t.Context(), repo, registry.Layer{Digest: "md5:x"})
	mustIs(t, err, digest.ErrDigestUnsupported)
}
