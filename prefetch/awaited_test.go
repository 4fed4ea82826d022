package prefetch_test

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/hearth-serverless/hearth/prefetch"
)

// TestRecordOnPurpose has starts recorded of an image of which enough is known.
func TestRecordOnPurpose(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": 8 * kib})
	tr := &fakeTracer{reads: []read{{path: filepath.Join(layer.Dir, "a"), length: 8 * kib}}}
	f, image := newPrefetcher(t, prefetch.Config{Tracer: tr}), imageOf(layer)
	for range 8 {
		start(t, f, image)
	}
	begun := tr.begun
	for range 3 {
		learnt, err := f.Record(image.ChainID)
		if err != nil {
			t.Fatal(err)
		}
		start(t, f, image)
		if err := <-learnt; err != nil {
			t.Error(err)
		}
	}
	if tr.begun != begun+3 || parsed(t, f, image).Starts != begun+3 {
		t.Errorf("%d recordings make a profile of %d starts", tr.begun, parsed(t, f, image).Starts)
	}
	first, _ := f.Record(image.ChainID)
	second, _ := f.Record(image.ChainID)
	if err := <-first; err == nil {
		t.Error("who was first is told of the other's start")
	}
	tr.end = errors.New("lost")
	start(t, f, image)
	if err := <-second; err == nil {
		t.Error("nothing was learnt, and nobody says so")
	}
	third, _ := f.Record(image.ChainID)
	tr.begin = errors.New("no BPF")
	f.Begin(image, []string{"/cgroup"})
	if err := <-third; err == nil {
		t.Error("nothing was recorded, and nobody says so")
	}
}

func TestRecordWhereNothingIs(t *testing.T) {
	var none *prefetch.Prefetcher
	for name, f := range map[string]*prefetch.Prefetcher{
		"none": none, "no tracer": newPrefetcher(t, prefetch.Config{}),
		"mode": newPrefetcher(t, prefetch.Config{Tracer: &fakeTracer{}, Mode: prefetch.ModeNone}),
	} {
		if _, err := f.Record(base); err == nil || f.Kept() != 0 {
			t.Errorf("%s: error %v", name, err)
		}
	}
}
