package instance

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// pullTime bounds a pull, whoever waits for it.
const pullTime = 15 * time.Minute

// maxKnownImages bounds the memory of images; a node that has more asks containerd again for those it has forgotten.
const maxKnownImages = 1000

// library knows the images that are on the node. It asks containerd once for each, and pulls those that are missing, each once
// however many wait for it. A pull goes on when those who wait have gone.
type library struct {
	backend images
	phases  func(ref string) ([]Phase, bool)
	spawn   func(func(context.Context)) bool

	mu    sync.Mutex // guards known and pulls
	known map[string]*image
	pulls map[string]*pull
}

// pull is one under way.
type pull struct {
	begin time.Time
	done  chan struct{} // closed when err and img are final
	img   *image
	err   error
}

func newLibrary(b images, phases func(string) ([]Phase, bool), spawn func(func(context.Context)) bool) *library {
	return &library{backend: b, phases: phases, spawn: spawn, known: map[string]*image{}, pulls: map[string]*pull{}}
}

// ensure returns an image, from memory if possible, and pulls it if it has to. What that took is noted in t.
func (l *library) ensure(ctx context.Context, ref string, t *trace) (*image, error) {
	l.mu.Lock()
	img, ok := l.known[ref]
	l.mu.Unlock()
	if ok {
		return img, nil
	}
	begin := time.Now()
	img, err := l.look(ctx, ref)
	if errdefs.IsNotFound(err) {
		img, err = l.pull(ctx, ref, t)
	}
	if err != nil {
		return nil, err
	}
	t.since(phaseImage, begin)
	return img, nil
}

// look asks containerd, whatever is remembered.
func (l *library) look(ctx context.Context, ref string) (*image, error) {
	img, err := l.backend.Image(ctx, ref)
	if err != nil {
		l.forget(ref)
		return nil, err
	}
	l.remember(img)
	return img, nil
}

func (l *library) remember(img *image) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.known) >= maxKnownImages {
		clear(l.known)
	}
	l.known[img.Ref] = img
}

// named finds a reference and the digest that it stands for, of an image with these layers. Where there are several, it prefers a name
// that says more than the digest.
func (l *library) named(chainID string) (ref string, dgst digest.Digest, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, img := range l.known {
		if img.ChainID != chainID {
			continue
		}
		byDigest, before := strings.Contains(img.Ref, "@"), strings.Contains(ref, "@")
		if !ok || before && !byDigest || before == byDigest && img.Ref < ref {
			ref, dgst, ok = img.Ref, img.Digest, true
		}
	}
	return ref, dgst, ok
}

func (l *library) forget(ref string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.known, ref)
}

// forgetImage forgets an image under all its references.
func (l *library) forgetImage(img *image) {
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.DeleteFunc(l.known, func(_ string, k *image) bool { return k.ChainID == img.ChainID })
}

// pull waits for the pull of an image, which it begins unless it is under way.
func (l *library) pull(ctx context.Context, ref string, t *trace) (*image, error) {
	l.mu.Lock()
	p, ok := l.pulls[ref]
	if !ok {
		p = &pull{begin: time.Now(), done: make(chan struct{})}
		l.pulls[ref] = p
	}
	l.mu.Unlock()
	if !ok && !l.spawn(func(ctx context.Context) { l.run(ctx, ref, p) }) {
		l.end(ref, p, nil, errStopping)
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("pull image %s: %w", ref, ctx.Err())
	}
	if p.err != nil {
		return nil, p.err
	}
	if l.phases != nil {
		if list, ok := l.phases(ref); ok {
			for _, ph := range list {
				if !ph.Start.Before(p.begin) { // not those of an earlier pull
					t.add(ph.Name, ph.Start, ph.Duration, ph.Busy)
				}
			}
		}
	}
	return p.img, nil
}

func (l *library) run(ctx context.Context, ref string, p *pull) {
	ctx, cancel := context.WithTimeout(ctx, pullTime)
	defer cancel()
	err := l.backend.Pull(ctx, ref)
	var img *image
	if err == nil {
		img, err = l.look(ctx, ref)
	}
	l.end(ref, p, img, err)
}

func (l *library) end(ref string, p *pull, img *image, err error) {
	p.img, p.err = img, err
	l.mu.Lock()
	delete(l.pulls, ref)
	l.mu.Unlock()
	close(p.done)
}
