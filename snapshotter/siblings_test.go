package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// counts gives a counter's values by its only label.
func counts(t *testing.T, reg *prometheus.Registry, name string) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name {
				out[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	return out
}

// inBubble runs a test in time of its own, in which no search for siblings takes longer than a layer waits for it.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	needRoot(t)
	synctest.Test(t, test)
}

func TestSiblingsAreTaken(t *testing.T) { inBubble(t, testSiblingsAreTaken) }

func testSiblingsAreTaken(t *testing.T) {
	f, reg := newFake(), prometheus.NewRegistry()
	img := f.image("a", "one", "two")
	f.accelerate(img, "zstd")
	s := start(t, f, func(c *snapshotter.Config) { c.Registerer = reg })
	pull{s: s, img: img}.all(t)
	for _, word := range []string{"one", "two"} {
		if f.count(word) != 0 && f.count(word+"@zstd") == 0 {
			t.Errorf("%s: original opened %d times, sibling %d", word, f.count(word), f.count(word+"@zstd"))
		}
	}
	if got := counts(t, reg, "hearth_snapshotter_layers_fetched_total"); got["zstd"] != 2 || got["original"] != 0 {
		t.Errorf("layers by source: %v", got)
	}
}

// TestSiblingFaults has siblings that go wrong in every way: the original is taken, once, and the sibling is not tried again.
func TestSiblingFaults(t *testing.T) {
	faults := map[string]struct {
		err    error
		reason string
	}{
		"wrong digest":   {corrupt("one@zstd"), "corrupt"},
		"cut off":        {io.ErrUnexpectedEOF, "corrupt"},
		"missing":        {&registry.StatusError{Code: 404}, "not_found"},
		"refused":        {&registry.StatusError{Code: 403}, "unauthorized"},
		"broken network": {errors.New("connection reset"), "other"},
	}
	for name, tt := range faults {
		t.Run(name, func(t *testing.T) { inBubble(t, func(t *testing.T) { testSiblingFault(t, tt.err, tt.reason) }) })
	}
}

func testSiblingFault(t *testing.T, fault error, reason string) {
	f, reg := newFake(), prometheus.NewRegistry()
	img := f.image("a", "one", "two")
	f.accelerate(img, "zstd")
	f.fail["one@zstd"] = fault
	var log strings.Builder
	root := t.TempDir()
	s := start(t, f, func(c *snapshotter.Config) {
		c.Root, c.Registerer, c.Logger = root, reg, slog.New(slog.NewTextHandler(&log, nil))
	})
	pull{s: s, img: img}.all(t)
	if got := counts(t, reg, "hearth_snapshotter_sibling_faults_total"); len(got) != 1 || got[reason] != 1 {
		t.Errorf("faults %v, want one of %s", got, reason)
	}
	if got := counts(t, reg, "hearth_snapshotter_layers_fetched_total"); got["original"] != 1 || got["zstd"] != 1 {
		t.Errorf("layers by source: %v", got)
	}
	if n := strings.Count(log.String(), "sibling of a layer cannot be used"); n != 1 {
		t.Errorf("said so %d times: %s", n, log.String())
	}
	if left := list(t, root, "staging"); len(left) != 0 {
		t.Errorf("left in staging: %v", left)
	}
	data, err := os.ReadFile(filepath.Join(root, "layers", treeOf(img.Layers[0].DiffID), "fs", "one"))
	if err != nil || string(data) != "one" {
		t.Errorf("tree has %q, error %v", data, err)
	}
}

func treeOf(d digest.Digest) string { return strings.Replace(d.String(), ":", "-", 1) }

// TestFaultsOfBoth has an original that is wrong too, or a full disk: those are the answer.
func TestFaultsOfBoth(t *testing.T) { inBubble(t, testFaultsOfBoth) }

func testFaultsOfBoth(t *testing.T) {
	f := newFake()
	img := f.image("a", "one")
	f.accelerate(img, "lz4")
	f.fail["one@lz4"], f.fail["one"] = errors.New("connection reset"), corrupt("one")
	s := start(t, f)
	if _, _, err := (pull{s: s, img: img}).prepare(t.Context(), 0, ""); !errors.Is(err, layer.ErrCorrupt) {
		t.Errorf("error %v, want the original's", err)
	}

	f = newFake()
	img = f.image("a", "one")
	f.accelerate(img, "lz4")
	f.fail["one@lz4"] = fmt.Errorf("write: %w", unix.ENOSPC)
	s = start(t, f)
	if _, _, err := (pull{s: s, img: img}).prepare(t.Context(), 0, ""); err == nil || f.count("one") > 0 && f.count("one@lz4") == 0 {
		t.Errorf("a full disk is no reason to fetch it again: %v", err)
	}
}

// TestForeignSiblings are siblings that are not for this image, or of a kind that is not known.
func TestForeignSiblings(t *testing.T) {
	changes := map[string]func(*registry.Sibling){
		"another layer":    func(s *registry.Sibling) { s.Original = digest.FromString("?") },
		"another diffID":   func(s *registry.Sibling) { s.DiffID = digest.FromString("?") },
		"another encoding": func(s *registry.Sibling) { s.Encoding = "brotli" },
		"another frame":    func(s *registry.Sibling) { s.FrameBytes = 1 << 30 },
	}
	for name, change := range changes {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			img := f.image("a", "one")
			f.accelerate(img, "zstd")
			change(&f.siblings[img.Digest][0])
			pull{s: start(t, f), img: img}.all(t)
			if f.count("one@zstd") != 0 || f.count("one") != 1 {
				t.Errorf("sibling opened %d times, original %d", f.count("one@zstd"), f.count("one"))
			}
		})
	}
}

// TestSearchIsSlow has a registry that does not answer: the original waits for it a little and no longer.
func TestSearchIsSlow(t *testing.T) {
	needRoot(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		img := f.image("a", "one", "two")
		f.accelerate(img, "zstd")
		f.search = make(chan struct{})
		s, err := snapshotter.New(snapshotter.Config{Root: t.TempDir(), Registry: f, Layers: f, Form: snapshotter.FormDirectory})
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		pull{s: s, img: img}.all(t)
		if took := time.Since(begun); took > time.Second || f.count("one") != 1 || f.count("one@zstd") != 0 {
			t.Errorf("took %v, original opened %d times, sibling %d", took, f.count("one"), f.count("one@zstd"))
		}
		if err := s.Close(); err != nil { // which ends the search
			t.Error(err)
		}
	})
}

// TestSearchIsRemembered has an image pulled again and again: a minute goes by before it is asked for siblings again.
func TestSearchIsRemembered(t *testing.T) {
	needRoot(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		img := f.image("a", "one")
		s, err := snapshotter.New(snapshotter.Config{Root: t.TempDir(), Registry: f, Layers: f, Form: snapshotter.FormDirectory})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for i, want := range []int{1, 1, 2} {
			name := pull{s: s, img: img}.all(t)
			if f.searches != want {
				t.Errorf("pull %d: %d searches, want %d", i, f.searches, want)
			}
			if err := s.Remove(t.Context(), name); err != nil {
				t.Fatal(err)
			}
			if err := s.Cleanup(context.WithoutCancel(t.Context())); err != nil {
				t.Fatal(err)
			}
			if i == 1 {
				time.Sleep(2 * time.Minute) // of the bubble
			}
		}
	})
}
