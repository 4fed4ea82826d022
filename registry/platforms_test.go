package registry_test

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/registry"
)

func TestPlatforms(t *testing.T) {
	var many []indexEntry
	for i := range 65 {
		many = append(many, indexEntry{platform("linux", fmt.Sprintf("arch%d", i)), "one"})
	}
	tests := map[string]struct {
		make func(o *origin, one, two digest.Digest) (ref string)
		want func(one, two digest.Digest) []registry.Platform
		err  error
	}{
		"manifest": {
			func(*origin, digest.Digest, digest.Digest) string { return repo + ":one" },
			func(one, _ digest.Digest) []registry.Platform { return []registry.Platform{{Digest: one}} }, nil},
		"manifest by digest": {
			func(_ *origin, _, two digest.Digest) string { return repo + "@" + two.String() },
			func(_, two digest.Digest) []registry.Platform { return []registry.Platform{{Digest: two}} }, nil},
		"index": {
			func(o *origin, _, _ digest.Digest) string {
				index(t, o, indexEntry{platform("linux", "s390x"), "one"}, indexEntry{platform("unknown", "unknown"), "two"},
					indexEntry{platform("windows", "amd64"), "one"}, indexEntry{nil, "one"}, indexEntry{platform("linux", "arm64"), "two"})
				return repo + ":1"
			},
			func(one, two digest.Digest) []registry.Platform {
				return []registry.Platform{{Name: "linux/s390x", Digest: one}, {Name: "linux/arm64", Digest: two}}
			}, nil},
		"none for linux": {
			func(o *origin, _, _ digest.Digest) string {
				index(t, o, indexEntry{platform("windows", "amd64"), "one"})
				return repo + ":1"
			}, nil, registry.ErrUnsupported},
		"too many": {
			func(o *origin, _, _ digest.Digest) string { index(t, o, many...); return repo + ":1" }, nil, registry.ErrUnsupported},
		"missing": {
			func(*origin, digest.Digest, digest.Digest) string { return repo + ":none" }, nil, registry.ErrNotFound},
		"no manifest": {
			func(o *origin, _, _ digest.Digest) string { o.addManifest("1", []byte("{}")); return repo + ":1" }, nil, registry.ErrUnsupported},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			o := newOrigin()
			one := o.addImage(t, "one", nil)
			two := o.addImage(t, "two", func(m object) { m["annotations"] = object{"a": "b"} })
			n := newFakeNet()
			defer n.serve(home, o)()
			c := newClient(t, n, registry.Config{})
			defer c.Close()
			got, err := c.Platforms(t.Context(), tt.make(o, one, two))
			mustIs(t, err, tt.err)
			var want []registry.Platform
			if tt.want != nil {
				want = tt.want(one, two)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
