package snapshotter_test

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// TestFetch brings an image before it is pulled: no Prepare has anything to wait for, and nothing is fetched or resolved twice.
func TestFetch(t *testing.T) {
	f := newFake()
	s := start(t, f)
	img := f.image("registry.example/a:1", "base", "lib", "app")
	if err := s.Fetch(t.Context(), "registry.example/a:1"); err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"base", "lib", "app"} {
		f.fail[word] = errors.New("nobody may ask for it again")
	}
	top := pull{s: s, img: img}.all(t)
	if diff := cmp.Diff([]string{"app", "base", "lib"}, files(t, s, top)); diff != "" {
		t.Error(diff)
	}
	if f.resolved != 1 || f.count("base") != 1 || f.count("lib") != 1 || f.count("app") != 1 {
		t.Errorf("resolved %d times, fetched %d, %d, %d times", f.resolved, f.count("base"), f.count("lib"), f.count("app"))
	}
	if p, ok := s.Pull("registry.example/a:1"); !ok || !p.Ended || p.Manifest != img.Digest || len(p.Layers) != 3 {
		t.Errorf("the pull is told as %+v", p)
	}
}

// TestFetchOfWhatIsThere holds nothing: the image's layers go with it, as they do if nobody had asked.
func TestFetchOfWhatIsThere(t *testing.T) {
	f := newFake()
	root := t.TempDir()
	var lines bytes.Buffer // of pulls, which end one after the other
	s := start(t, f, func(c *snapshotter.Config) {
		c.Root, c.Logger = root, slog.New(slog.NewTextHandler(&lines, &slog.HandlerOptions{Level: slog.LevelInfo}))
	})
	img := f.image("registry.example/a:1", "base", "app")
	p := pull{s: s, img: img}
	base, _, err := p.prepare(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	top, _, err := p.prepare(t.Context(), 1, base)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Fetch(t.Context(), img.Ref); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{top, base} {
		if err := s.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := list(t, root, "layers"); len(left) > 0 {
		t.Errorf("layers %q are left", left)
	}
	if n := strings.Count(lines.String(), "image pulled"); n != 1 {
		t.Errorf("%d lines of pulls, want that of the one that brought it", n)
	}
}

// TestFetchOfAnother has the tag moved between Fetch and the pull, which gets what it asks for.
func TestFetchOfAnother(t *testing.T) {
	f := newFake()
	s := start(t, f)
	f.image("registry.example/a:1", "base", "old")
	if err := s.Fetch(t.Context(), "registry.example/a:1"); err != nil {
		t.Fatal(err)
	}
	top := pull{s: s, img: f.image("registry.example/a:1", "base", "new")}.all(t)
	if diff := cmp.Diff([]string{"base", "new"}, files(t, s, top)); diff != "" {
		t.Error(diff)
	}
	if f.count("base") != 1 {
		t.Errorf("the layer that both have was fetched %d times", f.count("base"))
	}
}

// TestFetchFails has what Fetch meets come up again in the pull.
func TestFetchFails(t *testing.T) {
	f := newFake()
	s := start(t, f)
	img := f.image("registry.example/a:1", "base", "app")
	f.fail["app"] = &layer.CorruptError{Layer: img.Layers[1].Digest, Reason: "made up"}
	if err := s.Fetch(t.Context(), "registry.example/a:1"); !errors.Is(err, layer.ErrCorrupt) {
		t.Errorf("Fetch: %v", err)
	}
	p := pull{s: s, img: img}
	base, _, err := p.prepare(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.prepare(t.Context(), 1, base); !errors.Is(err, layer.ErrCorrupt) {
		t.Errorf("Prepare: %v", err)
	}
	if err := s.Fetch(t.Context(), "not a reference"); err == nil {
		t.Error("a malformed reference was fetched")
	}
}
