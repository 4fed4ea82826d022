package instance

import (
	"context"
	"crypto/rand"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// snapshotPrefix begins the keys of prepared snapshots.
const snapshotPrefix = "hearth-"

// prepareTime bounds the preparation of one snapshot.
const prepareTime = time.Minute

// shelf holds snapshots that were prepared ahead, by image. How many of an image it keeps is the sum of what its Revisions ask
// for. After one was taken it prepares another, in the background.
type shelf struct {
	backend snapshots
	library *library
	ahead   *ahead
	log     *slog.Logger
	spawn   func(func(context.Context)) bool
	lull    func(ctx context.Context, quiet time.Duration) bool

	mu     sync.Mutex // guards what follows
	stocks map[shelfKey]*stock
	busy   map[string]bool // keys of snapshots that are being prepared, on the shelf, or handed out and not yet a container's
}

// shelfKey tells images apart whose snapshots differ. References do not: an image is prepared by its tag and started by digest.
type shelfKey struct{ chainID, user string }

func keyOf(img *image) shelfKey { return shelfKey{img.ChainID, img.Config.User} }

// stock is what is kept of one image.
type stock struct {
	img     *image
	ready   []rootfs
	wanted  map[string]int // by Revision
	filling bool
}

func (s *stock) target() int {
	n := 0
	for _, w := range s.wanted {
		n += w
	}
	return min(n, maxSnapshots)
}

func newShelf(b snapshots, l *library, ahead *ahead, log *slog.Logger, spawn func(func(context.Context)) bool,
	lull func(context.Context, time.Duration) bool,
) *shelf {
	return &shelf{
		backend: b, library: l, ahead: ahead, log: log, spawn: spawn, lull: lull, stocks: map[shelfKey]*stock{}, busy: map[string]bool{},
	}
}

// take returns a snapshot of an image: from the shelf, or prepared now, which is noted in t. The caller removes it in the end and
// calls release then. On an error the snapshot may have a key nevertheless, which has to be removed too.
func (s *shelf) take(ctx context.Context, img *image, t *trace) (rootfs, error) {
	s.mu.Lock()
	if k := s.stocks[keyOf(img)]; k != nil && len(k.ready) > 0 {
		r := k.ready[len(k.ready)-1]
		k.ready = k.ready[:len(k.ready)-1]
		s.mu.Unlock()
		s.ahead.read(r.Layers)
		return r, nil
	}
	s.mu.Unlock()
	begin := time.Now()
	known := s.ahead.of(img.ChainID)
	s.ahead.read(known)
	r, err := s.prepare(ctx, img)
	if err == nil {
		t.since(phaseSnapshot, begin)
	}
	if known == nil {
		s.ahead.read(r.Layers)
	}
	return r, err
}

func (s *shelf) prepare(ctx context.Context, img *image) (rootfs, error) {
	key := snapshotPrefix + strings.ToLower(rand.Text())
	s.mu.Lock()
	s.busy[key] = true
	s.mu.Unlock()
	r, err := s.backend.PrepareSnapshot(ctx, key, img)
	if err != nil {
		r.close()
		r.Key = key // it may have been made although the answer was lost
		if errdefs.IsNotFound(err) {
			s.release(key)
			r.Key = ""
		}
	}
	s.ahead.learn(img.ChainID, r.Layers)
	return r, err
}

// hold says that a snapshot is somebody's: the container's of an Instance that was adopted.
func (s *shelf) hold(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy[key] = true
}

// release says that a snapshot is removed, or is none of the shelf's concern any more.
func (s *shelf) release(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, key)
}

// knows tells whether a snapshot is accounted for.
func (s *shelf) knows(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.busy[key]
}

// want sets how many snapshots of an image are kept for a Revision, and fills up before it returns. What its starts need is read ahead
// already now: the node may have been booted since the last one.
func (s *shelf) want(ctx context.Context, img *image, revision string, n int) error {
	s.mu.Lock()
	k := s.stocks[keyOf(img)]
	if k == nil {
		k = &stock{img: img, wanted: map[string]int{}}
		s.stocks[keyOf(img)] = k
	}
	k.wanted[revision] = n
	s.mu.Unlock()
	err := s.fill(ctx, keyOf(img))
	s.ahead.read(s.ahead.of(img.ChainID))
	return err
}

// wants tells whether a Revision wants an image.
func (s *shelf) wants(img *image) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, k := range s.stocks {
		if key.chainID == img.ChainID && len(k.wanted) > 0 {
			return true
		}
	}
	return false
}

// forget ends what a Revision asked for, and returns the snapshots that nobody asks for any more, for the caller to remove.
func (s *shelf) forget(revision string) (surplus []rootfs) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, k := range s.stocks {
		delete(k.wanted, revision)
		keep := min(k.target(), len(k.ready))
		surplus = append(surplus, k.ready[keep:]...)
		k.ready = k.ready[:keep]
		if len(k.wanted) == 0 && !k.filling {
			delete(s.stocks, key)
		}
	}
	return surplus
}

// refillDelay keeps a refill from taking disk and processor from the first request, for which the start was made, and from others.
const refillDelay = 100 * time.Millisecond

// refill fills up in the background, when there is a lull.
func (s *shelf) refill(img *image) {
	s.spawn(func(ctx context.Context) {
		if !s.lull(ctx, refillDelay) {
			return
		}
		if err := s.fill(ctx, keyOf(img)); err != nil && ctx.Err() == nil {
			s.log.Warn("snapshots not prepared", "image", img.Ref, "error", err)
		}
	})
}

// fill prepares snapshots until there are as many as are wanted. If another fill is at it, it leaves it to that one.
func (s *shelf) fill(ctx context.Context, key shelfKey) error {
	s.mu.Lock()
	k := s.stocks[key]
	if k == nil || k.filling {
		s.mu.Unlock()
		return nil
	}
	k.filling = true
	s.mu.Unlock()
	var err error
	for err == nil && s.short(k) {
		err = s.addOne(ctx, k)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k.filling = false
	if len(k.wanted) == 0 {
		delete(s.stocks, key)
	}
	return err
}

func (s *shelf) short(k *stock) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(k.ready) < k.target()
}

func (s *shelf) addOne(ctx context.Context, k *stock) error {
	ctx, cancel := context.WithTimeout(ctx, prepareTime)
	defer cancel()
	r, err := s.prepare(ctx, k.img)
	if err == nil && s.put(k, r) {
		return nil
	}
	if errdefs.IsNotFound(err) {
		s.library.forgetImage(k.img)
	}
	s.discard(ctx, r)
	return err
}

// put lays a snapshot on the shelf unless it is not wanted any more.
func (s *shelf) put(k *stock, r rootfs) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(k.ready) >= k.target() {
		return false
	}
	k.ready = append(k.ready, r)
	return true
}

// discard removes a snapshot. What cannot be removed now is found by the next comparison with containerd.
func (s *shelf) discard(ctx context.Context, r rootfs) {
	r.close()
	if r.Key == "" {
		return
	}
	defer s.release(r.Key)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), prepareTime)
	defer cancel()
	if err := s.backend.RemoveSnapshot(ctx, r.Key); err != nil {
		s.log.Warn("prepared snapshot not removed", "key", r.Key, "error", err)
	}
}

// count returns how many wait on the shelf.
func (s *shelf) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, k := range s.stocks {
		n += len(k.ready)
	}
	return n
}
