package prefetch

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// maxProfiles is how many images are remembered; the ones that were not used for longest go.
const maxProfiles = 1000

// suffix ends the name of a stored profile.
const suffix = ".profile"

// store keeps encoded profiles in a folder, each under the digest that names its image's content, and knows which have something
// of a layer.
type store struct {
	root string
	log  *slog.Logger

	disk sync.Mutex // guards the files: reading, merging and writing one is one step

	mu    sync.Mutex                               // guards index
	index map[digest.Digest]map[digest.Digest]bool // images by layer; nil until somebody asks
}

func openStore(root string, log *slog.Logger) (*store, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	files, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	for _, f := range files { // of earlier versions, or half written
		if !strings.HasSuffix(f.Name(), suffix) {
			err = errors.Join(err, os.Remove(filepath.Join(root, f.Name())))
		}
	}
	return &store{root: root, log: log}, err
}

func (s *store) path(image digest.Digest) string {
	return filepath.Join(s.root, strings.ReplaceAll(image.String(), ":", "-")+suffix)
}

// read is nil for an image that is not known, or whose profile cannot be read: it will be made anew.
func (s *store) read(image digest.Digest) (*Profile, []byte) {
	if image.Validate() != nil {
		return nil, nil
	}
	path := s.path(image)
	encoded, err := readBounded(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var p *Profile
	if err == nil {
		p, err = Parse(encoded)
	}
	if err != nil {
		s.log.Warn("a profile is of no use and will be made anew", "path", path, "error", err)
		return nil, nil
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // what is used stays; if it cannot be noted it goes a little early
	return p, encoded
}

func readBounded(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > MaxEncoded {
		return nil, fmt.Errorf("it has %d bytes", info.Size())
	}
	return os.ReadFile(path)
}

// change replaces a profile by what change makes of it, whole: a reader finds the old one or the new one. What is kept is what can be
// read again, and is returned.
func (s *store) change(image digest.Digest, change func(*Profile) *Profile) (*Profile, []byte, error) {
	if err := image.Validate(); err != nil {
		return nil, nil, fmt.Errorf("profile of image %q: %w", image, err)
	}
	s.disk.Lock()
	defer s.disk.Unlock()
	old, _ := s.read(image)
	p := change(old)
	encoded, err := p.Encode()
	if err != nil {
		return nil, nil, err
	}
	path := s.path(image)
	if err := os.WriteFile(path+".new", encoded, 0o600); err != nil {
		return nil, nil, errors.Join(err, os.Remove(path+".new"))
	}
	if err := os.Rename(path+".new", path); err != nil {
		return nil, nil, errors.Join(err, os.Remove(path+".new"))
	}
	s.noteLayers(image, p)
	return p, encoded, s.trim()
}

// trim removes the profiles that were not used for longest, beyond maxProfiles.
func (s *store) trim() error {
	images, err := s.images()
	if err != nil || len(images) <= maxProfiles {
		return err
	}
	oldest := images[len(images)-1]
	s.mu.Lock()
	for _, known := range s.index {
		delete(known, oldest)
	}
	s.mu.Unlock()
	return os.Remove(s.path(oldest))
}

// images lists those of which there is a profile, the latest used first.
func (s *store) images() ([]digest.Digest, error) {
	files, err := os.ReadDir(s.root)
	if err != nil {
		return nil, err
	}
	used := map[digest.Digest]time.Time{}
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), suffix)
		image := digest.Digest(strings.Replace(name, "-", ":", 1))
		info, err := f.Info()
		if ok && err == nil && image.Validate() == nil {
			used[image] = info.ModTime()
		}
	}
	return slices.SortedFunc(maps.Keys(used), func(a, b digest.Digest) int {
		return cmp.Or(used[b].Compare(used[a]), cmp.Compare(a, b))
	}), nil
}

func (s *store) noteLayers(image digest.Digest, p *Profile) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.index == nil {
		return
	}
	for _, l := range p.Layers() {
		if s.index[l] == nil {
			s.index[l] = map[digest.Digest]bool{}
		}
		s.index[l][image] = true
	}
}

// relatives lists images that have profiles, by how many of these layers those know something of, most first.
func (s *store) relatives(layers []Layer) []digest.Digest {
	s.mu.Lock()
	built := s.index != nil
	if !built {
		s.index = map[digest.Digest]map[digest.Digest]bool{}
	}
	s.mu.Unlock()
	if !built { // once: later ones are noted as they come
		images, err := s.images()
		if err != nil {
			s.log.Warn("profiles are not found by their layers", "error", err)
		}
		for _, image := range images {
			if encoded, err := readBounded(s.path(image)); err == nil {
				if p, err := Parse(encoded); err == nil {
					s.noteLayers(image, p)
				}
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	common := map[digest.Digest]int{}
	for _, l := range layers {
		for image := range s.index[l.DiffID] {
			common[image]++
		}
	}
	return slices.SortedFunc(maps.Keys(common), func(a, b digest.Digest) int {
		return cmp.Or(cmp.Compare(common[b], common[a]), cmp.Compare(a, b))
	})
}
