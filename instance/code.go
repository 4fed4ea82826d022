package instance

import (
	"context"
	"crypto/rand"
	"log/slog"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// codeStore keeps code packages at hand: a view of each, mounted once where nobody sees it, of which every claim gets a clone. A
// view stays as long as a Revision asks for it or an Instance has it.
type codeStore struct {
	backend interface {
		views
		snapshots
	}
	library *library
	log     *slog.Logger
	spawn   func(func(context.Context)) bool

	mu      sync.Mutex           // guards what follows
	current map[string]*codeView // by chain id: those that claims may have
	all     map[string]*codeView // by the key of their snapshot: also those of a former engine, and those that are being removed
}

// codeView is the view of one package.
type codeView struct {
	key, chainID string
	ready        chan struct{} // closed when tree and err are final
	tree         codeTree      // nil if a former engine made it
	err          error
	users        int             // guarded by the store's mu, as is what follows
	wanted       map[string]bool // by Revision
}

func newCodeStore(b backend, l *library, log *slog.Logger, spawn func(func(context.Context)) bool) *codeStore {
	return &codeStore{
		backend: b, library: l, log: log, spawn: spawn, current: map[string]*codeView{}, all: map[string]*codeView{},
	}
}

// take returns the view of a package, which is fetched and mounted if it is not at hand. The caller releases it.
func (s *codeStore) take(ctx context.Context, ref string, t *trace) (*codeView, error) {
	_, v, err := s.find(ctx, ref, t, "")
	return v, err
}

// want has a package at hand for a Revision, until it is forgotten.
func (s *codeStore) want(ctx context.Context, ref, revision string, t *trace) (*image, error) {
	img, v, err := s.find(ctx, ref, t, revision)
	if err != nil {
		return nil, err
	}
	s.release(ctx, v.key)
	return img, nil
}

// find is take; revision wants the view from then on, if there is one. A package that turns out to have been removed behind the
// engine's back is fetched again, once.
func (s *codeStore) find(ctx context.Context, ref string, t *trace, revision string) (*image, *codeView, error) {
	for again := true; ; again = false {
		img, err := s.library.ensure(ctx, ref, t)
		if err != nil {
			return nil, nil, err
		}
		v := s.use(img, revision)
		select {
		case <-v.ready:
			err = v.err
		case <-ctx.Done():
			err = ctx.Err()
		}
		if err == nil {
			return img, v, nil
		}
		s.release(ctx, v.key)
		if !again || !errdefs.IsNotFound(err) {
			return nil, nil, err
		}
		s.library.forgetImage(img)
	}
}

// use counts a user of a package's view, which is being made from now on if there is none.
func (s *codeStore) use(img *image, revision string) *codeView {
	s.mu.Lock()
	v := s.current[img.ChainID]
	made := v == nil
	if made {
		v = &codeView{
			key: snapshotPrefix + strings.ToLower(rand.Text()), chainID: img.ChainID, ready: make(chan struct{}), wanted: map[string]bool{},
		}
		v.users++ // the making itself
		s.current[v.chainID], s.all[v.key] = v, v
	}
	v.users++
	if revision != "" {
		v.wanted[revision] = true
	}
	s.mu.Unlock()
	if made && !s.spawn(func(ctx context.Context) { s.make(ctx, v, img) }) {
		v.err = errStopping
		close(v.ready)
	}
	return v
}

func (s *codeStore) make(ctx context.Context, v *codeView, img *image) {
	bounded, cancel := context.WithTimeout(ctx, prepareTime)
	defer cancel()
	v.tree, v.err = s.backend.View(bounded, v.key, img)
	if v.err != nil {
		s.mu.Lock()
		delete(s.current, v.chainID) // the next one tries anew
		clear(v.wanted)
		s.mu.Unlock()
	}
	close(v.ready)
	s.release(ctx, v.key)
}

// adopt counts an Instance that has a former engine's view.
func (s *codeStore) adopt(v *codeView) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all[v.key] == nil {
		s.all[v.key] = v
	}
	s.all[v.key].users++
}

// release ends a use of a view, and removes it if it was the last.
func (s *codeStore) release(ctx context.Context, key string) {
	s.mu.Lock()
	v := s.all[key]
	v.users--
	s.mu.Unlock()
	s.drop(ctx, v)
}

// forget ends what a Revision asked for.
func (s *codeStore) forget(ctx context.Context, revision string) {
	s.mu.Lock()
	var asked []*codeView
	for _, v := range s.all {
		if v.wanted[revision] {
			delete(v.wanted, revision)
			asked = append(asked, v)
		}
	}
	s.mu.Unlock()
	for _, v := range asked {
		s.drop(ctx, v)
	}
}

// drop removes a view that nobody uses or asks for. What cannot be removed now is found by the next comparison with containerd.
func (s *codeStore) drop(ctx context.Context, v *codeView) {
	s.mu.Lock()
	needed := v.users > 0 || len(v.wanted) > 0 || s.all[v.key] != v
	if !needed {
		delete(s.all, v.key)
		if s.current[v.chainID] == v {
			delete(s.current, v.chainID)
		}
	}
	s.mu.Unlock()
	if needed {
		return
	}
	if v.tree != nil {
		_ = v.tree.Close() // it was only read from
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), prepareTime)
	defer cancel()
	if err := s.backend.RemoveSnapshot(ctx, v.key); err != nil {
		s.log.Warn("view of a code package not removed", "key", v.key, "error", err)
	}
}

// uses tells whether the package of these layers is asked for or used.
func (s *codeStore) uses(chainID string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.all {
		if v.chainID == chainID {
			return true
		}
	}
	return false
}

// knows tells whether a snapshot is accounted for.
func (s *codeStore) knows(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all[key] != nil
}

// releaseCode ends an Instance's use of its Function's package, when its container is no more.
func (e *Engine) releaseCode(ctx context.Context, i *instance) {
	i.mu.Lock()
	code := i.code
	i.code = nil
	i.mu.Unlock()
	if code != nil {
		e.codes.release(ctx, code.key)
	}
}
