package profiles

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/registry"
)

const (
	// maxWaiting profiles wait to be pushed; more are left to other nodes.
	maxWaiting = 64
	// A push is tried so often, with pauses that double.
	pushAttempts = 4
	retryDelay   = 30 * time.Second
	pushTime     = time.Minute
	// refusalHold is how long a registry that took no profile is not asked again: rights change, but seldom.
	refusalHold = time.Hour
	// enough profiles beside an image make another one superfluous.
	enough = 4
)

// ripe is a profile to push.
type ripe struct {
	chain   digest.Digest
	encoded []byte
}

var (
	errUnknown = errors.New("its reference is not known any more")
	errRefused = errors.New("the registry has refused before")
)

// Ripe takes a profile that enough starts on this node have made; Run pushes it. It never blocks.
func (s *Sharer) Ripe(image digest.Digest, encoded []byte) {
	select {
	case s.ripe <- ripe{image, encoded}:
	default:
		s.cfg.Logger.Debug("too many profiles wait to be pushed, one is left to other nodes", "image", image)
	}
}

// Run pushes what is ripe, until ctx ends.
func (s *Sharer) Run(ctx context.Context) error {
	for {
		select {
		case r := <-s.ripe:
			s.share(ctx, r)
		case <-ctx.Done():
			return nil
		}
	}
}

// share pushes a profile, again if what went wrong may pass.
func (s *Sharer) share(ctx context.Context, r ripe) {
	for attempt, delay := 1, retryDelay; ; attempt, delay = attempt+1, 2*delay {
		bounded, cancel := context.WithTimeout(ctx, pushTime)
		img, err := s.push(bounded, r)
		cancel()
		switch {
		case err == nil && img != nil:
			s.cfg.Logger.Info("profile pushed beside its image", "image", img.Ref, "digest", img.Digest, "bytes", len(r.encoded))
		case err == nil, errors.Is(err, errRefused): // there is nothing to do
		case img != nil && isRefusal(err):
			s.refused(img.Ref, err)
		case attempt < pushAttempts && !errors.Is(err, errUnknown) && pause(ctx, delay):
			continue
		default:
			s.cfg.Logger.Debug("profile not pushed", "image", r.chain, "error", err)
		}
		return
	}
}

// push attaches a profile to its image. No image and no error: there is nothing to do.
func (s *Sharer) push(ctx context.Context, r ripe) (*registry.Image, error) {
	img, err := s.imageOf(ctx, r.chain)
	if err != nil {
		return nil, err
	}
	host, err := hostOf(img.Ref)
	if err != nil || !s.cfg.Share.with(host) {
		return nil, err
	}
	if s.isRefused(host) {
		return nil, errRefused
	}
	known, err := prefetch.Parse(r.encoded)
	if err != nil {
		return nil, err
	}
	if found, err := s.cfg.Registry.Profiles(ctx, img.Ref, img.Digest); err == nil && len(found) >= enough {
		s.learn(ctx, r.chain, img) // others were faster
		return nil, nil
	}
	return img, s.cfg.Registry.AttachProfile(ctx, img, registry.Profile{
		Data: r.encoded, Created: time.Now(), Starts: known.Starts, Platform: "linux/" + runtime.GOARCH, Node: s.cfg.Node,
	})
}

// imageOf finds the image whose layers these are, as it was pulled.
func (s *Sharer) imageOf(ctx context.Context, chain digest.Digest) (*registry.Image, error) {
	s.mu.Lock()
	img := s.pulled[chain]
	s.mu.Unlock()
	if img != nil {
		return img, nil
	}
	if s.cfg.Named == nil {
		return nil, errUnknown
	}
	ref, dgst, ok := s.cfg.Named(chain)
	if !ok {
		return nil, errUnknown
	}
	if host, err := hostOf(ref); err != nil || !s.cfg.Share.with(host) {
		return nil, errors.Join(errUnknown, err) // and nobody needs to ask
	}
	img, err := s.cfg.Registry.Image(ctx, ref, dgst)
	if err != nil {
		return nil, err
	}
	if got := img.ChainID(); got != chain {
		return nil, fmt.Errorf("image %s has other layers now: %w", ref, errUnknown)
	}
	return img, nil
}

func hostOf(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("image %q: %w", ref, err)
	}
	return reference.Domain(named), nil
}

// isRefusal says whether an error is a registry's that does not let us write.
func isRefusal(err error) bool {
	var status *registry.StatusError
	return errors.Is(err, registry.ErrUnauthorized) || errors.As(err, &status) && status.Code == http.StatusMethodNotAllowed
}

func (s *Sharer) isRefused(host string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.refusals[host])
}

// refused notes that a registry takes nothing, and says so the first time.
func (s *Sharer) refused(ref string, err error) {
	host, _ := hostOf(ref) // it was read before
	s.mu.Lock()
	_, said := s.refusals[host]
	if len(s.refusals) >= maxRemembered {
		clear(s.refusals)
	}
	s.refusals[host] = time.Now().Add(refusalHold)
	s.mu.Unlock()
	if said {
		return
	}
	s.cfg.Logger.Warn("registry does not take profiles of images: other nodes learn on their own; give this node's credentials the right to push, or leave the registry out of --share-profiles",
		"registry", host, "image", ref, "asked_again_after", refusalHold, "error", err)
}

// pause waits, and is false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
