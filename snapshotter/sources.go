package snapshotter

import (
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/registry"
)

// maxSources bounds the layers whose origin is remembered.
const maxSources = 4096

// sources remembers of which image a layer is. When containerd misses a snapshot at the creation of a container it asks for the
// layers again, but without naming the image.
type sources struct {
	mu    sync.Mutex // guards by and order
	by    map[digest.Digest]source
	order []digest.Digest // of first mention
}

type source struct {
	image sessionKey
	layer digest.Digest
}

func (s *sources) add(key sessionKey, img *registry.Image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range img.Layers {
		if _, known := s.by[l.DiffID]; !known {
			if len(s.order) == maxSources {
				delete(s.by, s.order[0])
				s.order = s.order[1:]
			}
			s.order = append(s.order, l.DiffID)
		}
		s.by[l.DiffID] = source{image: key, layer: l.Digest}
	}
}

// complete fills in what a target's labels lack, if it is known.
func (s *sources) complete(t *target) {
	if t.complete() || t.diffID == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if src, ok := s.by[t.diffID]; ok {
		t.image, t.manifest, t.layer = src.image.ref, src.image.manifest, src.layer
	}
}
