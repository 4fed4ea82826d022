package snapshotter

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// FuzzParseTarget: whatever the labels say, what comes out is well-formed and names no path.
func FuzzParseTarget(f *testing.F) {
	d := digest.FromString("x").String()
	f.Add(d, d, "registry.example/a:1", d, d)
	f.Add(d, "", "", "", "")
	f.Add("sha256:../../etc", d, "a", d, d)
	f.Add("", "sha512:zz", "a\x00b", "md5:00", ":")
	f.Fuzz(func(t *testing.T, chain, diffID, image, manifest, layer string) {
		got, err := parseTarget(map[string]string{
			snapshots.LabelSnapshotRef: chain, snapshots.LabelSnapshotDiffID: diffID, snapshotters.TargetRefLabel: image,
			snapshotters.TargetManifestDigestLabel: manifest, snapshotters.TargetLayerDigestLabel: layer,
		})
		if err != nil {
			if got != nil {
				t.Fatal("a target with an error")
			}
			return
		}
		if got.chain.Validate() != nil {
			t.Fatalf("chain %q", got.chain)
		}
		for _, d := range []digest.Digest{got.diffID, got.manifest, got.layer} {
			if d != "" && d.Validate() != nil {
				t.Fatalf("digest %q", d)
			}
		}
		if got.diffID != "" {
			if name := treeName(got.diffID, got.chain); strings.ContainsAny(name, "/:,\x00") || len(name) > 255 {
				t.Fatalf("tree name %q", name)
			}
		}
	})
}

func TestLabelsAreContainerds(t *testing.T) {
	for ours, theirs := range map[string]string{
		labelImage: snapshotters.TargetRefLabel, labelManifest: snapshotters.TargetManifestDigestLabel, labelLayer: snapshotters.TargetLayerDigestLabel,
	} {
		if ours != theirs {
			t.Errorf("%s, containerd says %s", ours, theirs)
		}
	}
}

func TestTargetFollows(t *testing.T) {
	a, b := digest.FromString("a"), digest.FromString("b")
	ab := identity.ChainID([]digest.Digest{a, b})
	for _, c := range []struct {
		target target
		parent digest.Digest
		want   bool
	}{
		{target{chain: a, diffID: a}, "", true},
		{target{chain: b, diffID: a}, "", false},
		{target{chain: ab, diffID: b}, a, true},
		{target{chain: ab, diffID: b}, b, false},
		{target{chain: b, diffID: b}, a, false},
	} {
		if got := c.target.follows(c.parent); got != c.want {
			t.Errorf("%+v on %q: %v", c.target, c.parent, got)
		}
	}
}
