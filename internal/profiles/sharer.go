package profiles

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/registry"
)

const (
	// searchHold is how long what a registry has of an image is not asked for again.
	searchHold = time.Minute
	// maxRemembered bounds the images of which something is remembered.
	maxRemembered = 256
)

// Store is what is known on this node. *prefetch.Prefetcher is one.
type Store interface {
	Profile(image digest.Digest) ([]byte, bool)
	Learn(image digest.Digest, encoded []byte) error
	Replay(ctx context.Context, image prefetch.Image)
}

// Registry is where images and their profiles come from. *registry.Client is one.
type Registry interface {
	Image(ctx context.Context, ref string, dgst digest.Digest) (*registry.Image, error)
	Profiles(ctx context.Context, ref string, manifest digest.Digest) ([]registry.Profile, error)
	AttachProfile(ctx context.Context, img *registry.Image, p registry.Profile) error
}

// Config of a Sharer. Store, Registry and Node are required.
type Config struct {
	Store    Store
	Registry Registry
	// Node is this node's name.
	Node string
	// Share says to which registries profiles are pushed.
	Share Share
	// Named finds a reference of an image by its layers, and the digest of what it stands for. Nil: only what was pulled since the start
	// is known.
	Named  func(chainID digest.Digest) (ref string, dgst digest.Digest, ok bool)
	Logger *slog.Logger // nil: none

	unused bool // nobody wants to know what starts read
}

// Flags defines the flags of what people may want to set.
func (c *Config) Flags(f *pflag.FlagSet) { c.Share.Flags(f) }

// Sharer looks for profiles and pushes them. It is safe for concurrent use. It is a snapshotter.Profiles.
type Sharer struct {
	cfg  Config
	ripe chan ripe

	mu       sync.Mutex                        // guards what follows
	pulled   map[digest.Digest]*registry.Image // by chain ID
	searches map[digest.Digest]*search         // by manifest
	refusals map[string]time.Time              // by registry: when it may be asked again
}

// search is for an image's profiles.
type search struct {
	done  chan struct{}
	until time.Time // set before done is closed: when it may be repeated
}

// New makes a Sharer.
func New(cfg Config) *Sharer {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Sharer{
		cfg: cfg, ripe: make(chan ripe, maxWaiting),
		pulled: map[digest.Digest]*registry.Image{}, searches: map[digest.Digest]*search{}, refusals: map[string]time.Time{},
	}
}

// Open opens the node's profiles, and makes the Sharer that is their hook.
func Open(cfg Config, ahead prefetch.Config) (*Sharer, *prefetch.Prefetcher, error) {
	cfg.unused = ahead.Mode != "" && ahead.Mode != prefetch.ModeProfile
	s := New(cfg)
	ahead.Learned = s.Ripe
	known, err := prefetch.New(ahead)
	s.cfg.Store = known
	return s, known, err
}

// Needed implements snapshotter.Profiles: it tells what a profile that is known says, and learns what is beside the image if none is.
func (s *Sharer) Needed(ctx context.Context, img *registry.Image) []digest.Digest {
	if s.cfg.unused {
		return nil
	}
	chain := img.ChainID()
	s.remember(chain, img)
	if known := s.known(chain); known != nil && known.Starts >= prefetch.Ripe {
		return known.Layers()
	}
	s.search(ctx, chain, img)
	if known := s.known(chain); known != nil {
		return known.Layers()
	}
	return nil
}

func (s *Sharer) remember(chain digest.Digest, img *registry.Image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pulled) >= maxRemembered {
		clear(s.pulled)
	}
	s.pulled[chain] = img
}

// known is the profile of an image, or nil.
func (s *Sharer) known(chain digest.Digest) *prefetch.Profile {
	encoded, ok := s.cfg.Store.Profile(chain)
	if !ok {
		return nil
	}
	p, err := prefetch.Parse(encoded)
	if err != nil {
		return nil
	}
	return p
}

// search looks for profiles beside an image, together with others who do, and returns when they are learnt or ctx ends.
func (s *Sharer) search(ctx context.Context, chain digest.Digest, img *registry.Image) {
	s.mu.Lock()
	se := s.searches[img.Digest]
	if se != nil && (!se.over() || time.Now().Before(se.until)) {
		s.mu.Unlock()
		select {
		case <-se.done:
		case <-ctx.Done():
		}
		return
	}
	se = &search{done: make(chan struct{})}
	if len(s.searches) >= maxRemembered {
		clear(s.searches)
	}
	s.searches[img.Digest] = se
	s.mu.Unlock()
	defer close(se.done)
	defer func() { se.until = time.Now().Add(searchHold) }()
	s.learn(ctx, chain, img)
}

func (se *search) over() bool {
	select {
	case <-se.done:
		return true
	default:
		return false
	}
}

// learn has the store learn what is beside an image, the oldest first, and says how many of those were of use.
func (s *Sharer) learn(ctx context.Context, chain digest.Digest, img *registry.Image) (learnt int) {
	found, err := s.cfg.Registry.Profiles(ctx, img.Ref, img.Digest)
	if err != nil {
		s.cfg.Logger.Debug("profiles are not known, starts go on without", "image", img.Ref, "error", err)
	}
	for i := len(found) - 1; i >= 0; i-- {
		if err := s.cfg.Store.Learn(chain, found[i].Data); err != nil {
			s.cfg.Logger.Debug("a profile is of no use", "image", img.Ref, "node", found[i].Node, "error", err)
			continue
		}
		learnt++
	}
	if learnt > 0 {
		s.cfg.Logger.Info("profiles learnt from the registry", "image", img.Ref, "profiles", learnt)
	}
	return learnt
}

// Unpacked implements snapshotter.Profiles: what starts of the image need is read ahead.
func (s *Sharer) Unpacked(ctx context.Context, img *registry.Image, trees []string) {
	s.mu.Lock()
	se := s.searches[img.Digest]
	s.mu.Unlock()
	if se != nil { // it may be under way still
		select {
		case <-se.done:
		case <-ctx.Done():
			return
		}
	}
	what := prefetch.Image{ChainID: img.ChainID()}
	for i, l := range img.Layers {
		what.Layers = append(what.Layers, prefetch.Layer{DiffID: l.DiffID, Dir: trees[i]})
	}
	s.cfg.Store.Replay(ctx, what)
}
