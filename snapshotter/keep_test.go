package snapshotter_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// shelf keeps blobs in memory, or fails to.
type shelf struct {
	mu                      sync.Mutex // guards all below
	kept                    map[digest.Digest]string
	open                    int
	failKeep, failWrite, no error // no: of commit
}

type shelved struct {
	*shelf
	bytes.Buffer
	closed bool
}

func (*shelf) Hold(ctx context.Context) (context.Context, error) { return ctx, nil }

func (s *shelf) Keep(_ context.Context, _ string, l registry.Layer) (io.WriteCloser, func(context.Context) error, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failKeep != nil {
		return nil, nil, s.failKeep
	}
	if _, ok := s.kept[l.Digest]; ok {
		return nil, nil, nil
	}
	s.open++
	w := &shelved{shelf: s}
	return w, func(context.Context) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.no != nil {
			return s.no
		}
		s.kept[l.Digest] = w.String()
		return nil
	}, nil
}

func (w *shelved) Write(p []byte) (int, error) {
	if w.failWrite != nil {
		return 0, w.failWrite
	}
	return w.Buffer.Write(p)
}

func (w *shelved) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		w.closed = true
		w.open--
	}
	return nil
}

// Blobs that can be kept are; that one cannot is no reason not to have its layer.
func TestKeepBlobs(t *testing.T) {
	for name, c := range map[string]struct {
		shelf *shelf
		kept  int
		fail  error // of the second layer
	}{
		"kept":           {&shelf{}, 2, nil},
		"no place":       {&shelf{failKeep: errors.New("no")}, 0, nil},
		"cannot write":   {&shelf{failWrite: errors.New("no")}, 0, nil},
		"cannot commit":  {&shelf{no: errors.New("no")}, 0, nil},
		"a corrupt blob": {&shelf{}, 1, corrupt("two")},
	} {
		f := newFake()
		c.shelf.kept = map[digest.Digest]string{}
		s := start(t, f, func(cfg *snapshotter.Config) { cfg.Blobs = c.shelf })
		f.body = "compressed"
		p := pull{s: s, img: f.image("reg/a:1", "one", "two")}
		if c.fail != nil {
			f.fail["two"] = c.fail
			parent, _, err := p.prepare(t.Context(), 0, "")
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := p.prepare(t.Context(), 1, parent); !errors.Is(err, c.fail) {
				t.Errorf("%s: %v", name, err)
			}
		} else {
			p.all(t)
		}
		c.shelf.mu.Lock()
		if len(c.shelf.kept) != c.kept || c.shelf.open != 0 {
			t.Errorf("%s: %d blobs kept, want %d; %d left open", name, len(c.shelf.kept), c.kept, c.shelf.open)
		}
		for d, content := range c.shelf.kept {
			if content != "compressed" {
				t.Errorf("%s: %s is %q", name, d, content)
			}
		}
		c.shelf.mu.Unlock()
	}
}
