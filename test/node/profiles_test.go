package node_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/opencontainers/go-digest"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/profiles"
	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// learner is what a node knows, and shares.
type learner struct {
	*profiles.Sharer
	known *prefetch.Prefetcher
}

// startLearner runs one until the test ends. One that records has a tracer.
func startLearner(t *testing.T, name string, images *registry.Client, records bool) *learner {
	t.Helper()
	ahead := prefetch.Config{Root: t.TempDir(), Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}
	if records {
		if ahead.Trace(ahead.Logger); ahead.Tracer == nil {
			t.Skip("this kernel does not tell what starts read")
		}
	}
	cfg := profiles.Config{Registry: images, Node: name, Logger: ahead.Logger}
	if err := cfg.Share.Set("all"); err != nil {
		t.Fatal(err)
	}
	sharer, known, err := profiles.Open(cfg, ahead)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := sharer.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	return &learner{sharer, known}
}

// withTop is an image of a program below, and a file above.
func withTop(t *testing.T, below v1.Image, content string) v1.Image {
	t.Helper()
	tar := tarball(t, fileEntry("top", content))
	img, err := mutate.AppendLayers(below, blobLayer{blob: gzipped.encode(t, tar), tar: tar, media: gzipped.mediaType()})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestProfileOfAnotherNode has a node learn what starts of an image read, and another one, which never ran it, use that: for the
// image, and for the next version of it, of which one layer is another.
func TestProfileOfAnotherNode(t *testing.T) {
	for _, api := range []bool{true, false} {
		t.Run(fmt.Sprintf("referrers API %v", api), func(t *testing.T) { testProfileOfAnotherNode(t, startRegistry(t, ggcr.WithReferrersSupport(api))) })
	}
}

func testProfileOfAnotherNode(t *testing.T, images *testRegistry) {
	var one *learner
	n := newNodeOf(t, images, func(n *instanceNode, c *registry.Client) snapshotter.Profiles {
		one = startLearner(t, "one", c, true)
		n.prefetch = one.known
		return one
	})
	program := programImage(t, "function", functionSource)
	first := n.registry.push(t, "functions/learnt:1", withTop(t, program, "one"))
	second := n.registry.push(t, "functions/learnt:2", withTop(t, program, "another"))
	service := profiles.Service{Node: n.engine, Known: one.known}
	chain := n.learn(service, first)

	client, err := registry.New(registry.Config{HostsDir: hostsDir(t, images.Server)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	img, err := client.Image(t.Context(), first, "")
	if err != nil || img.ChainID() != chain {
		t.Fatalf("chain ID is %s, not %s: %v", img.ChainID(), chain, err)
	}
	n.eventually(func() error {
		found, err := client.Profiles(t.Context(), first, img.Digest)
		if err == nil && (len(found) != 1 || found[0].Node != "one") {
			err = fmt.Errorf("profiles beside the image: %d", len(found))
		}
		return err
	})

	two := startLearner(t, "two", client, false)
	other := startPuller(t, images, client, two)
	for _, ref := range []string{first, second} { // of the second one layer is known
		img, err := client.Image(t.Context(), ref, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := other.Images.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
			t.Fatal(err)
		}
		n.eventually(func() error {
			for _, u := range two.known.Usage() {
				if u.Image == img.ChainID() && u.Hits+u.Ahead > 0 {
					return nil
				}
			}
			return fmt.Errorf("nothing of %s was read ahead: %+v", ref, two.known.Usage())
		})
	}
	encoded, ok := two.known.Profile(chain)
	if !ok {
		t.Fatal("the other node has learnt nothing")
	}
	p, err := prefetch.Parse(encoded)
	if err != nil || p.Starts < prefetch.Ripe {
		t.Fatalf("profile of %d starts, error %v", p.Starts, err)
	}
	for i, path := range []string{"function", "top"} {
		if !slices.ContainsFunc(p.Files, func(f prefetch.File) bool { return f.Layer == img.Layers[i].DiffID && f.Path == path }) {
			t.Errorf("%s is not in the profile: %+v", path, p.Files)
		}
	}
}

// learn has a node start an image until its profile is ripe.
func (n *instanceNode) learn(s profiles.Service, ref string) digest.Digest {
	n.t.Helper()
	chain, err := s.Node.Pull(n.t.Context(), ref)
	if err != nil {
		n.t.Fatal(err)
	}
	for range prefetch.Ripe {
		learnt, err := s.Known.Record(chain)
		if err != nil {
			n.t.Fatal(err)
		}
		_, err = s.Node.Try(n.t.Context(), &hearthv1.Revision{Image: ref, Port: 8080, Concurrency: 1}, func(_ context.Context, address string) error {
			n.get(address, "/file?name=/top")
			return nil
		})
		if err != nil {
			n.t.Fatal(err)
		}
		if err := <-learnt; err != nil {
			n.t.Fatal(err)
		}
	}
	return chain
}

// startPuller is a node that pulls, and runs nothing.
func startPuller(t *testing.T, images *testRegistry, c *registry.Client, know snapshotter.Profiles) *containerdNode {
	t.Helper()
	unpacker, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	s, err := snapshotter.New(snapshotter.Config{Root: root, Registry: c, Layers: unpacker, Profiles: know, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		unmountBelow(t, root)
	})
	return startContainerd(t, containerdOptions{Snapshotter: s, HostsDir: hostsDir(t, images.Server)})
}
