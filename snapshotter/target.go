package snapshotter

import (
	_ "crypto/sha256" // the algorithms that digests may name
	_ "crypto/sha512"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// Labels that containerd adds for remote snapshotters (its pkg/snapshotters), whoever pulls; "cri" is history.
const (
	labelImage    = "containerd.io/snapshot/cri.image-ref"
	labelManifest = "containerd.io/snapshot/cri.manifest-digest"
	labelLayer    = "containerd.io/snapshot/cri.layer-digest"
)

// maxReference is longer than any reference that a registry accepts.
const maxReference = 1024

// target is what a Prepare's labels say about the layer that is to be unpacked. Except for chain, any of it may be missing: an
// older containerd sends no diffID, and no annotations come if they are switched off.
type target struct {
	chain    digest.Digest // the name under which the snapshot will be looked for
	diffID   digest.Digest
	image    string // as the registry's client understands it
	manifest digest.Digest
	layer    digest.Digest
}

// parseTarget reads the labels of a Prepare. It is nil, without an error, if the snapshot is not one to unpack a layer into. The
// labels can carry annotations of a foreign manifest, so nothing in them is believed before it is checked.
func parseTarget(labels map[string]string) (*target, error) {
	chain, ok := labels[snapshots.LabelSnapshotRef]
	if !ok {
		return nil, nil
	}
	t := &target{image: labels[labelImage]}
	for _, l := range []struct {
		label string
		value string
		into  *digest.Digest
	}{
		{snapshots.LabelSnapshotRef, chain, &t.chain},
		{snapshots.LabelSnapshotDiffID, labels[snapshots.LabelSnapshotDiffID], &t.diffID},
		{labelManifest, labels[labelManifest], &t.manifest},
		{labelLayer, labels[labelLayer], &t.layer},
	} {
		if l.value == "" && l.into != &t.chain {
			continue
		}
		d, err := digest.Parse(l.value)
		if err != nil {
			return nil, fmt.Errorf("label %s: %w", l.label, err)
		}
		*l.into = d
	}
	if len(t.image) > maxReference {
		return nil, errors.New("label " + labelImage + ": too long for a reference")
	}
	return t, nil
}

// complete says whether the labels name the layer's image.
func (t *target) complete() bool { return t.image != "" && t.manifest != "" && t.layer != "" }

// follows says whether the chain is the parent's plus this diffID. parent is empty for the lowest layer.
func (t *target) follows(parent digest.Digest) bool {
	if parent == "" {
		return t.chain == t.diffID
	}
	return t.chain == identity.ChainID([]digest.Digest{parent, t.diffID})
}
