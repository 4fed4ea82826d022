package prefetch

import (
	"errors"

	"github.com/opencontainers/go-digest"
)

// awaited is a recording that somebody waits for.
type awaited struct {
	learnt chan error
	starts int // that were known before
}

var (
	errNotRecorded = errors.New("starts are not recorded here: nodeagent's log says why, or --prefetch is none")
	errNothing     = errors.New("nothing that it read is of the image's layers, or it could not be recorded; nodeagent's log has more at --log-level debug")
	errAnother     = errors.New("another start of the image was waited for")
)

// Record has the next start of an image recorded, whatever is known of it. learnt is told once how that went: nil when it is part of
// the profile. Who asks again is the one who is told.
func (f *Prefetcher) Record(image digest.Digest) (learnt <-chan error, err error) {
	if f == nil || f.cfg.Mode == ModeNone || f.cfg.Tracer == nil {
		return nil, errNotRecorded
	}
	f.load(image)
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.of(image)
	if k.awaited != nil {
		k.awaited.learnt <- errAnother
	}
	k.awaited = &awaited{learnt: make(chan error, 1), starts: k.usage.Starts}
	return k.awaited.learnt, nil
}

// tell says how the recording that has ended went; mu of the Prefetcher must be held.
func (k *known) tell() {
	if k.awaited == nil {
		return
	}
	var err error
	if k.usage.Starts <= k.awaited.starts {
		err = errNothing
	}
	k.awaited.learnt <- err
	k.awaited = nil
}

// keeps notes how many bytes are kept in memory.
func (f *Prefetcher) keeps(bytes int64) {
	f.metrics.kept.Set(float64(bytes))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kept = bytes
}

// Kept is how many bytes are kept in memory, because several images of the node need them.
func (f *Prefetcher) Kept() int64 {
	if f == nil {
		return 0
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.kept
}
