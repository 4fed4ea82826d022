package profiles_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/hearth-serverless/hearth/internal/profiles"
	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/registry"
)

// encoded is a profile of some starts that says something of layers.
func encoded(t *testing.T, starts int, layers ...string) []byte {
	t.Helper()
	p := &prefetch.Profile{Starts: starts, Weight: 1}
	for i, l := range layers {
		p.Files = append(p.Files, prefetch.File{Layer: digest.FromString(l), Path: "usr/bin/app", Ranges: []prefetch.Range{{Length: 8192, Order: i, Seen: 1}}})
	}
	data, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// imageOf is an image of layers, as a registry names it.
func imageOf(ref string, layers ...string) (*registry.Image, digest.Digest) {
	img := &registry.Image{Ref: ref, Digest: digest.FromString(ref), MediaType: "m", Size: 1}
	var chain []digest.Digest
	for _, l := range layers {
		img.Layers = append(img.Layers, registry.Layer{Digest: digest.FromString("blob of " + l), DiffID: digest.FromString(l), Size: 1})
		chain = append(chain, digest.FromString(l))
	}
	return img, identity.ChainID(chain)
}

// store is what a node knows.
type store struct {
	mu       sync.Mutex // guards what follows
	known    map[digest.Digest][]byte
	replayed []prefetch.Image
}

func (s *store) Profile(image digest.Digest) ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, ok := s.known[image]
	return data, ok
}

func (s *store) Learn(image digest.Digest, data []byte) error {
	if _, err := prefetch.Parse(data); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[image] = data
	return nil
}

func (s *store) Replay(_ context.Context, image prefetch.Image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replayed = append(s.replayed, image)
}

// shelf is a registry.
type shelf struct {
	mu       sync.Mutex // guards what follows
	beside   map[digest.Digest][]registry.Profile
	images   map[string]*registry.Image
	err      error         // of AttachProfile
	slow     time.Duration // of Profiles
	asked    int           // Profiles
	attempts int           // AttachProfile
}

func (r *shelf) Image(_ context.Context, ref string, _ digest.Digest) (*registry.Image, error) {
	if img := r.images[ref]; img != nil {
		return img, nil
	}
	return nil, registry.ErrNotFound
}

func (r *shelf) Profiles(ctx context.Context, _ string, manifest digest.Digest) ([]registry.Profile, error) {
	r.mu.Lock()
	r.asked++
	r.mu.Unlock()
	select {
	case <-time.After(r.slow):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.beside[manifest]), nil
}

func (r *shelf) AttachProfile(_ context.Context, img *registry.Image, p registry.Profile) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.attempts++
	if r.err != nil {
		return r.err
	}
	r.beside[img.Digest] = append([]registry.Profile{p}, r.beside[img.Digest]...)
	return nil
}

// node is a Sharer with its surroundings.
type node struct {
	*profiles.Sharer
	store *store
	log   *bytes.Buffer
}

// start makes a node that pushes until the test's bubble ends.
func start(t *testing.T, name string, r *shelf, share string, change ...func(*profiles.Config)) *node {
	t.Helper()
	n := &node{store: &store{known: map[digest.Digest][]byte{}}, log: &bytes.Buffer{}}
	cfg := profiles.Config{Store: n.store, Registry: r, Node: name, Logger: slog.New(slog.NewTextHandler(n.log, nil))}
	if err := cfg.Share.Set(share); err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(&cfg)
	}
	n.Sharer = profiles.New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return n
}

func newShelf() *shelf {
	return &shelf{beside: map[digest.Digest][]registry.Profile{}, images: map[string]*registry.Image{}}
}

// TestWhatOneNodeLearnsAnotherKnows has a profile ripen on one node, and another pull the image.
func TestWhatOneNodeLearnsAnotherKnows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newShelf()
		img, chain := imageOf("reg.example/app:1", "base", "lib", "app")
		one, two := start(t, "one", r, "reg.example"), start(t, "two", r, "none")
		if needed := one.Needed(t.Context(), img); needed != nil {
			t.Errorf("it knows of %v", needed)
		}
		one.Ripe(chain, encoded(t, 3, "base", "app"))
		synctest.Wait()
		needed := two.Needed(t.Context(), img)
		if !slices.Equal(needed, []digest.Digest{digest.FromString("base"), digest.FromString("app")}) {
			t.Errorf("needed are %v", needed)
		}
		two.Unpacked(t.Context(), img, []string{"/base", "/lib", "/app"})
		if len(two.store.replayed) != 1 || two.store.replayed[0].ChainID != chain || two.store.replayed[0].Layers[2].Dir != "/app" {
			t.Errorf("read ahead is %+v", two.store.replayed)
		}
		if p := r.beside[img.Digest][0]; p.Node != "one" || p.Starts != 3 || !strings.HasPrefix(p.Platform, "linux/") || p.Created.IsZero() {
			t.Errorf("pushed is %+v", p)
		}
		asked := r.asked
		if two.Needed(t.Context(), img); r.asked != asked {
			t.Error("who knows enough asks the registry")
		}
	})
}

// TestNobodyIsAskedTwice has two pulls of an image wait for one search, and a third soon after.
func TestNobodyIsAskedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newShelf()
		r.slow = time.Second
		img, _ := imageOf("reg.example/app:1", "base")
		n := start(t, "one", r, "none")
		var pulls sync.WaitGroup
		for range 2 {
			pulls.Go(func() { n.Needed(t.Context(), img) })
		}
		pulls.Wait()
		n.Needed(t.Context(), img)
		if r.asked != 1 {
			t.Errorf("asked %d times", r.asked)
		}
		time.Sleep(2 * time.Minute)
		if n.Needed(t.Context(), img); r.asked != 2 {
			t.Errorf("asked %d times after a while", r.asked)
		}
	})
}

// TestNobodyIsAskedForNothing has a node that reads nothing ahead, or everything.
func TestNobodyIsAskedForNothing(t *testing.T) {
	for mode, want := range map[prefetch.Mode]int{prefetch.ModeNone: 0, prefetch.ModeWhole: 0, prefetch.ModeProfile: 1, "": 1} {
		r := newShelf()
		img, _ := imageOf("reg.example/app:1", "base")
		s, _, err := profiles.Open(profiles.Config{Registry: r, Node: "one"}, prefetch.Config{Root: t.TempDir(), Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		if s.Needed(t.Context(), img); r.asked != want {
			t.Errorf("mode %q: asked %d times", mode, r.asked)
		}
	}
}

// TestUselessProfiles are left where they are.
func TestUselessProfiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newShelf()
		img, _ := imageOf("reg.example/app:1", "base")
		r.beside[img.Digest] = []registry.Profile{{Data: []byte("nonsense"), Node: "evil"}, {Data: encoded(t, 1, "base"), Node: "good"}, {Node: "empty"}}
		n := start(t, "one", r, "none")
		if needed := n.Needed(t.Context(), img); len(needed) != 1 {
			t.Errorf("needed are %v", needed)
		}
	})
}

// TestPushes has registries answer in ways of their own.
func TestPushes(t *testing.T) {
	refused := func(code int) error { return fmt.Errorf("push: %w", &registry.StatusError{Code: code}) }
	tests := map[string]struct {
		share    string
		err      error
		attempts int // within an hour, of three images
		said     int
	}{
		"taken":               {"all", nil, 3, 0},
		"named":               {"other.example,reg.example:5000", nil, 3, 0},
		"another is named":    {"other.example", nil, 0, 0},
		"nobody is":           {"none", nil, 0, 0},
		"without credentials": {"all", refused(401), 1, 1},
		"without the right":   {"all", refused(403), 1, 1},
		"read only":           {"all", refused(405), 1, 1},
		"broken":              {"all", errors.New("connection reset"), 12, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newShelf()
				r.err = tt.err
				n := start(t, "one", r, tt.share)
				for _, app := range []string{"a", "b", "c"} {
					img, chain := imageOf("reg.example:5000/"+app+":1", app)
					n.Needed(t.Context(), img)
					n.Ripe(chain, encoded(t, 3, app))
				}
				time.Sleep(59 * time.Minute)
				synctest.Wait()
				if r.attempts != tt.attempts {
					t.Errorf("%d attempts, want %d", r.attempts, tt.attempts)
				}
				if said := strings.Count(n.log.String(), "registry does not take profiles"); said != tt.said {
					t.Errorf("said so %d times: %s", said, n.log)
				}
			})
		})
	}
}

// TestRefusalIsNotForEver has a registry that lets the node push later, which is not told twice that it does not.
func TestRefusalIsNotForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newShelf()
		r.err = &registry.StatusError{Code: 403}
		n := start(t, "one", r, "all")
		img, chain := imageOf("reg.example/app:1", "app")
		n.Needed(t.Context(), img)
		for range 2 {
			n.Ripe(chain, encoded(t, 3, "app"))
			time.Sleep(2 * time.Hour)
			synctest.Wait()
		}
		r.err = nil
		n.Ripe(chain, encoded(t, 3, "app"))
		synctest.Wait()
		if len(r.beside[img.Digest]) != 1 || strings.Count(n.log.String(), "level=WARN") != 1 {
			t.Errorf("pushed %v, said %s", r.beside, n.log)
		}
	})
}

// TestEnoughIsEnough has so many profiles beside an image that another node's is not needed: it learns from them.
func TestEnoughIsEnough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newShelf()
		img, chain := imageOf("reg.example/app:1", "app")
		n := start(t, "one", r, "all")
		n.Needed(t.Context(), img)
		for range 4 {
			r.beside[img.Digest] = append(r.beside[img.Digest], registry.Profile{Data: encoded(t, 3, "app")})
		}
		n.Ripe(chain, encoded(t, 3, "app"))
		synctest.Wait()
		if _, ok := n.store.Profile(chain); r.attempts != 0 || !ok {
			t.Errorf("%d attempts, learnt %v", r.attempts, ok)
		}
	})
}

// TestImageThatWasThere was pulled before this nodeagent began: the node knows its name.
func TestImageThatWasThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newShelf()
		img, chain := imageOf("reg.example/app:1", "app")
		moved, gone := digest.FromString("moved"), digest.FromString("gone")
		r.images[img.Ref] = img
		n := start(t, "one", r, "all", func(c *profiles.Config) {
			c.Named = func(d digest.Digest) (string, digest.Digest, bool) { return img.Ref, img.Digest, d != gone }
		})
		for _, d := range []digest.Digest{gone, moved, chain} {
			n.Ripe(d, encoded(t, 3, "app"))
		}
		synctest.Wait()
		if r.attempts != 1 || len(r.beside[img.Digest]) != 1 {
			t.Errorf("%d attempts, pushed %v", r.attempts, r.beside)
		}
	})
}

// TestUnpackedWaitsForTheSearch has an image unpacked before its profile has come.
func TestUnpackedWaitsForTheSearch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newShelf()
		r.slow = time.Second
		img, _ := imageOf("reg.example/app:1", "app")
		n := start(t, "one", r, "none")
		var both sync.WaitGroup
		both.Go(func() { n.Needed(t.Context(), img) })
		synctest.Wait()
		begin := time.Now()
		n.Unpacked(t.Context(), img, []string{"/app"})
		if took := time.Since(begin); took != time.Second || len(n.store.replayed) != 1 {
			t.Errorf("read ahead %v after %s", n.store.replayed, took)
		}
		both.Wait()
	})
}

func TestShare(t *testing.T) {
	for text, want := range map[string]string{
		"": "none", "none": "none", "false": "none", "all": "all", "true": "all", "reg.example": "reg.example",
		"127.0.0.1:5000,docker.io": "127.0.0.1:5000,docker.io",
	} {
		var s profiles.Share
		if err := s.Set(text); err != nil || s.String() != want {
			t.Errorf("%q is %q, error %v", text, s.String(), err)
		}
	}
	for _, text := range []string{"https://reg.example", "app", "reg.example/team", ",", "reg.example,", "a b.example"} {
		var s profiles.Share
		if err := s.Set(text); err == nil || !strings.Contains(err.Error(), "HOST") {
			t.Errorf("%q is %q, error %v", text, s.String(), err)
		}
	}
}

func FuzzShare(f *testing.F) {
	for _, s := range []string{"all", "a.b:5000,c.d", ",", "[::1]:5000", "x/../y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s, again profiles.Share
		if s.Set(text) == nil && (again.Set(s.String()) != nil || again.String() != s.String()) {
			t.Errorf("%q becomes %q and %q", text, s.String(), again.String())
		}
	})
}
