package snapshotter

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

const (
	// profileTimeout bounds a search for a profile; one that comes later than the layers is kept for the start.
	profileTimeout = 5 * time.Second
	// replayTimeout bounds what is done with an image that has been unpacked.
	replayTimeout = time.Minute
)

// beside is what goes on beside pulls, and delays none of them.
type beside struct {
	profiles Profiles // or nil
	running  sync.WaitGroup

	mu      sync.Mutex // guards what follows, and Go against Wait
	closed  bool
	next    int
	cancels map[int]context.CancelFunc
}

func newBeside(p Profiles) *beside {
	return &beside{profiles: p, cancels: map[int]context.CancelFunc{}}
}

// do has f run beside a pull, unless nobody knows profiles. ctx lends it its values, not its end.
func (b *beside) do(ctx context.Context, within time.Duration, f func(ctx context.Context)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.profiles == nil || b.closed {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), within)
	id := b.next
	b.next++
	b.cancels[id] = cancel
	b.running.Go(func() {
		f(ctx)
		cancel()
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.cancels, id)
	})
}

// close ends what runs and waits for it.
func (b *beside) close() {
	b.mu.Lock()
	b.closed = true
	for _, cancel := range b.cancels {
		cancel()
	}
	b.mu.Unlock()
	b.running.Wait()
}

// ask finds out which layers of a session's image starts need, and has those brought before the others that still wait.
func (s *sessions) ask(ctx context.Context, se *session) {
	s.beside.do(ctx, profileTimeout, func(ctx context.Context) {
		needed := s.beside.profiles.Needed(ctx, se.image)
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, diffID := range needed {
			if j := se.jobs[diffID]; j != nil {
				j.first.Store(true)
			}
		}
	})
}

// unpacked tells of an image whose last layer was prepared.
func (s *sessions) unpacked(ctx context.Context, se *session) {
	s.beside.do(ctx, replayTimeout, func(ctx context.Context) {
		if trees := s.treesOf(se); trees != nil {
			s.beside.profiles.Unpacked(ctx, se.image, trees)
		}
	})
}

// treesOf are the directories of an image's layers; nil if one is not there, which containerd has unpacked itself.
func (s *sessions) treesOf(se *session) []string {
	diffIDs := make([]digest.Digest, len(se.image.Layers))
	for i, l := range se.image.Layers {
		diffIDs[i] = l.DiffID
	}
	var dirs []string
	for i, chain := range identity.ChainIDs(diffIDs) { // in place
		found := ""
		for _, name := range []string{treeName(se.image.Layers[i].DiffID, ""), treeName(se.image.Layers[i].DiffID, chain)} {
			if _, err := s.trees.stat(name); err == nil {
				found = name
			}
		}
		if found == "" {
			return nil
		}
		dirs = append(dirs, filepath.Join(s.trees.path(found), "fs"))
	}
	return dirs
}
