package node_test

import (
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hearth-serverless/hearth/bench/faults"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// TestFaultyRegistry pulls from a registry that fails, in each way that `bench pull-faults` measures, by both of CRI's paths: the
// tree is right, or the error names the layer, and nothing is left in the making.
func TestFaultyRegistry(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *pullNode) {
		for _, fault := range faults.All() {
			t.Run(fault.Name, func(t *testing.T) { n.suffers(t, fault) })
		}
	}, func(c *registry.Config, _ *snapshotter.Config) { c.StallTimeout = time.Second })
}

func (n *pullNode) suffers(t *testing.T, fault faults.Fault) {
	img := imageOf(t, gzipped, tarball(t, fileEntry("fault", fault.Name)), tarball(t, fileEntry("noise", noise(fault.Name, 3<<20))))
	want := n.reference(t, n.registry.push(t, "faults:"+fault.Name, img), img)
	server := httptest.NewServer(faults.New(n.registry.Listener.Addr().String(), layerSizes(t, img), fault))
	t.Cleanup(server.Close)
	err := n.pull(t, server.Listener.Addr().String()+"/faults:"+fault.Name, nil)
	switch {
	case err == nil && fault.Want == faults.Refused:
		t.Error("the pull says that it is right")
	case err != nil && fault.Want == faults.Right:
		t.Error(err)
	case err != nil:
		named := false
		for digest := range layerSizes(t, img) {
			named = named || strings.Contains(err.Error(), digest)
		}
		if !named {
			t.Errorf("the error names no layer: %v", err)
		}
	default:
		if diff := cmp.Diff(want, n.trees(t, n.context(t), "hearth", img)); diff != "" {
			t.Errorf("trees (-containerd +hearth):\n%s", diff)
		}
	}
	staged, err := filepath.Glob(filepath.Join(n.root, "staging", "*"))
	for end := time.Now().Add(time.Minute); err == nil && len(staged) > 0 && time.Now().Before(end); { // jobs that were cancelled
		time.Sleep(10 * time.Millisecond)
		staged, err = filepath.Glob(filepath.Join(n.root, "staging", "*"))
	}
	if err != nil || len(staged) > 0 {
		t.Errorf("left in the making: %v %v", staged, err)
	}
}

// noise does not compress, so that a layer has the size of its tar, and more than one range. Other names make other layers, which
// are not there already.
func noise(name string, bytes int) string {
	var seed [32]byte
	copy(seed[:], name)
	random := rand.NewChaCha8(seed)
	out := make([]byte, bytes)
	_, _ = random.Read(out) // which never fails
	return string(out)
}

// layerSizes of an image's blobs.
func layerSizes(t *testing.T, img v1.Image) map[string]int64 {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	sizes := map[string]int64{}
	for i, h := range layerDigests(t, img) {
		size, err := layers[i].Size()
		if err != nil {
			t.Fatal(fmt.Errorf("layer %d: %w", i, err))
		}
		sizes[h.String()] = size
	}
	return sizes
}
