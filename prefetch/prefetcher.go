package prefetch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// enoughStarts are observed of an image; more would tell little that is new.
	enoughStarts = 3
	// maxProfiles is how many images are remembered; the ones that were not used for longest go.
	maxProfiles = 1000
	// DefaultBudget bounds what is read ahead for one image.
	DefaultBudget = 256 << 20
	// readAheadTime bounds how long reading ahead may go on.
	readAheadTime = 30 * time.Second
)

// Config of a Prefetcher. Root is required.
type Config struct {
	Root       string // folder of profiles, this Prefetcher's own
	Budget     int64  // bytes read ahead for one image; default DefaultBudget
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Prefetcher keeps profiles of a node's images, by the digest that names an image's content. It is safe for concurrent use.
type Prefetcher struct {
	cfg     Config
	metrics *metrics

	mu sync.Mutex // guards the files: reading, merging and writing one is one step
}

// New opens the folder of profiles.
func New(cfg Config) (*Prefetcher, error) {
	if cfg.Budget == 0 {
		cfg.Budget = DefaultBudget
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, fmt.Errorf("prefetch: %w", err)
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("prefetch: %w", err)
	}
	return &Prefetcher{cfg: cfg, metrics: m}, nil
}

// Started notes what a Function that has come to listen needed for it, until enough is known of its image.
func (f *Prefetcher) Started(image digest.Digest, pid uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	known := f.load(image)
	if known != nil && known.Starts >= enoughStarts {
		return
	}
	p, err := Observe(pid)
	if err == nil {
		if known != nil {
			known.merge(p)
			p = known
		}
		err = f.store(image, p)
	}
	f.metrics.observed(err)
	if err != nil { // the process may have ended
		f.cfg.Logger.Debug("start not observed", "image", image, "err", err)
		return
	}
	f.cfg.Logger.Debug("start observed", "image", image, "starts", p.Starts, "files", len(p.Files), "bytes", p.Bytes())
}

// ReadAhead reads what starts of an image have needed from below root, its root file system. It returns when the kernel has been
// asked for all of it, or ctx ends. Of an image that is not known it does nothing.
func (f *Prefetcher) ReadAhead(ctx context.Context, image digest.Digest, root *os.File) {
	f.mu.Lock()
	p := f.load(image)
	f.mu.Unlock()
	if p == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, readAheadTime)
	defer cancel()
	begin := time.Now()
	n, err := readAhead(ctx, root, p, f.cfg.Budget)
	f.metrics.bytes.Add(float64(n))
	f.metrics.seconds.Observe(time.Since(begin).Seconds())
	f.cfg.Logger.Debug("read ahead", "image", image, "bytes", n, "took", time.Since(begin), "err", err)
}

func (f *Prefetcher) path(image digest.Digest) string {
	return filepath.Join(f.cfg.Root, image.Encoded()+".json")
}

// load is nil for an image that is not known, or whose profile cannot be read: it will be observed anew.
func (f *Prefetcher) load(image digest.Digest) *Profile {
	if image.Validate() != nil {
		return nil
	}
	path := f.path(image)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var p *Profile
	if err == nil {
		p, err = parseProfile(text)
	}
	if err != nil {
		f.cfg.Logger.Warn("profile is of no use and will be made anew", "path", path, "err", err)
		return nil
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // what is used stays; if it cannot be noted it goes a little early
	return p
}

// store replaces a profile whole: a reader finds the old one or the new one.
func (f *Prefetcher) store(image digest.Digest, p *Profile) error {
	if err := image.Validate(); err != nil {
		return fmt.Errorf("image %q: %w", image, err)
	}
	text, err := p.encode()
	if err != nil {
		return err
	}
	made := f.path(image) + ".new"
	if err := os.WriteFile(made, text, 0o600); err != nil {
		return errors.Join(err, os.Remove(made))
	}
	if err := os.Rename(made, f.path(image)); err != nil {
		return errors.Join(err, os.Remove(made))
	}
	return f.trim()
}

// trim removes the profiles that were not used for longest, beyond maxProfiles.
func (f *Prefetcher) trim() error {
	files, err := os.ReadDir(f.cfg.Root)
	if err != nil || len(files) <= maxProfiles {
		return err
	}
	oldest, when := "", time.Now()
	for _, d := range files {
		if info, err := d.Info(); err == nil && info.ModTime().Before(when) {
			oldest, when = d.Name(), info.ModTime()
		}
	}
	if oldest == "" {
		return nil
	}
	return os.Remove(filepath.Join(f.cfg.Root, oldest))
}
