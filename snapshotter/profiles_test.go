package snapshotter_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// knowing is a snapshotter.Profiles.
type knowing struct {
	silent bool // until it is told to end

	mu       sync.Mutex // guards what follows
	asked    []string
	ended    int
	unpacked chan []string
}

func (k *knowing) Needed(ctx context.Context, img *registry.Image) []digest.Digest {
	k.mu.Lock()
	k.asked = append(k.asked, img.Ref)
	k.mu.Unlock()
	if k.silent {
		<-ctx.Done()
		k.mu.Lock()
		defer k.mu.Unlock()
		k.ended++
		return nil
	}
	return []digest.Digest{img.Layers[0].DiffID, digest.FromString("of another image")}
}

func (k *knowing) Unpacked(_ context.Context, _ *registry.Image, trees []string) { k.unpacked <- trees }

// TestUnpackedIsTold has who knows profiles asked once for a pull, and told where its layers are.
func TestUnpackedIsTold(t *testing.T) {
	f, k := newFake(), &knowing{unpacked: make(chan []string, 10)}
	s := start(t, f, func(c *snapshotter.Config) { c.Profiles, c.Form = k, snapshotter.FormDirectory })
	img := f.image("registry.example/a:1", "base", "lib", "app")
	if err := s.Fetch(t.Context(), img.Ref); err != nil {
		t.Fatal(err)
	}
	pull{s: s, img: img}.all(t)
	trees := <-k.unpacked
	if len(trees) != 3 {
		t.Fatalf("trees %q", trees)
	}
	for i, word := range []string{"base", "lib", "app"} {
		if _, err := os.Stat(filepath.Join(trees[i], word)); err != nil {
			t.Errorf("tree %d: %v", i, err)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.asked) != 1 || k.asked[0] != img.Ref || len(k.unpacked) != 0 {
		t.Errorf("asked for %q, told %d times more", k.asked, len(k.unpacked))
	}
}

// TestPullDoesNotWaitForProfiles has one who never answers: the pull is through, and closing ends the question.
func TestPullDoesNotWaitForProfiles(t *testing.T) {
	f, k := newFake(), &knowing{silent: true, unpacked: make(chan []string, 10)}
	s := start(t, f, func(c *snapshotter.Config) { c.Profiles = k })
	pull{s: s, img: f.image("registry.example/a:1", "base", "app")}.all(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if len(k.asked) != k.ended || len(k.asked) != 1 {
		t.Errorf("asked %d times, ended %d", len(k.asked), k.ended)
	}
}
