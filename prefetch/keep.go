package prefetch

import (
	"cmp"
	"context"
	"math"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// keepInterval is how often it is decided anew what is kept.
	keepInterval = 30 * time.Second
	// pressureInterval is how often it is asked whether the node is short of memory while something is kept.
	pressureInterval = time.Second
	// relief is for how long nothing is kept after the node was short of memory.
	relief = 5 * time.Minute
	// maxKept bounds the mappings: a process may have 65,530.
	maxKept = 8192
)

// count notes a start.
func (k *known) count(now time.Time) {
	k.starts = k.frequency(now) + 1
	k.counted = now
}

// frequency is how many starts there were, of which those of an hour ago count half.
func (k *known) frequency(now time.Time) float64 {
	return k.starts * math.Exp2(-now.Sub(k.counted).Hours())
}

// shared is a file of a layer that several images of the node need.
type shared struct {
	key    fileKey
	dir    string
	images int
	needed float64 // starts that need it × bytes that they would have to read
	parts  []span
}

func (s *shared) bytes() (n int64) {
	for _, p := range s.parts {
		n += p.length
	}
	return n
}

// worth is how much reading it saves for the memory that it takes.
func (s *shared) worth() float64 { return s.needed / float64(s.bytes()) }

// common lists what several images' starts need, within a budget of bytes, what is worth most first.
func (f *Prefetcher) common(budget int64, now time.Time) []*shared {
	type source struct {
		frequency float64
		steps     []step
		layers    []Layer
	}
	var images []source
	f.mu.Lock()
	for _, k := range f.known {
		if k.profile != nil && k.frequency(now) > 0.1 {
			images = append(images, source{k.frequency(now), k.steps, k.layers})
		}
	}
	f.mu.Unlock()
	all := map[fileKey]*shared{}
	for _, image := range images {
		dirs := map[digest.Digest]string{}
		for _, l := range image.layers {
			dirs[l.DiffID] = l.Dir
		}
		seen := map[fileKey]bool{}
		for _, s := range image.steps {
			key := fileKey{s.layer, s.path}
			if dirs[s.layer] == "" {
				continue
			}
			if all[key] == nil {
				all[key] = &shared{key: key}
			}
			c := all[key]
			c.dir = dirs[s.layer]
			if !seen[key] {
				seen[key] = true
				c.images++
			}
			c.needed += image.frequency * float64(bytesOf([]step{s}))
			c.parts = append(c.parts, s.ranges...)
		}
	}
	var list []*shared
	for _, c := range all {
		if c.images > 1 {
			c.parts = joinNear(c.parts, 0)
			list = append(list, c)
		}
	}
	slices.SortFunc(list, func(a, b *shared) int {
		return cmp.Or(cmp.Compare(b.worth(), a.worth()), cmp.Compare(a.key.layer, b.key.layer), cmp.Compare(a.key.path, b.key.path))
	})
	return slices.DeleteFunc(list, func(c *shared) bool {
		n := c.bytes()
		if n > budget {
			return true
		}
		budget -= n
		return false
	})
}

// keptFile is one that is kept in memory by mappings that are locked, or read again now and then where that is not permitted.
type keptFile struct {
	file  fileID
	parts []span
	areas [][]byte
	bytes int64
}

func (k *keptFile) letGo() {
	for _, area := range k.areas {
		_ = unix.Munmap(area) // which unlocks it; it is ours
	}
	k.areas, k.bytes = nil, 0
}

// keeper keeps in memory what several images need. It is Run's alone.
type keeper struct {
	f      *Prefetcher
	kept   map[fileKey]*keptFile
	locked bool // as far as is known, the kernel permits it
	until  time.Time
}

// Run keeps in memory what several images of the node need, until ctx is done.
func (f *Prefetcher) Run(ctx context.Context) error {
	if f == nil || f.cfg.Keep == 0 || f.cfg.Mode == ModeNone {
		return nil
	}
	k := &keeper{f: f, kept: map[fileKey]*keptFile{}, locked: true}
	defer k.letGo()
	decide, look := time.NewTicker(keepInterval), time.NewTicker(pressureInterval)
	defer decide.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			if len(k.kept) > 0 {
				k.giveWay()
			}
		case <-decide.C:
			if time.Now().After(k.until) {
				aside(10, func() { k.keep(ctx, f.common(f.cfg.Keep, time.Now())) })
			}
		}
	}
}

// giveWay lets go of everything if the node is short of memory.
func (k *keeper) giveWay() {
	if k.f.cfg.Short == nil {
		return
	}
	short, err := k.f.cfg.Short()
	if err != nil {
		k.f.cfg.Logger.Warn("the node's memory is not known", "error", err)
	}
	if short {
		k.f.cfg.Logger.Info("what images have in common is not kept in memory for now: the node is short of it", "files", len(k.kept))
		k.letGo()
		k.until = time.Now().Add(relief)
	}
}

func (k *keeper) letGo() {
	for _, kept := range k.kept {
		kept.letGo()
	}
	clear(k.kept)
	k.f.metrics.kept.Set(0)
}

// keep keeps what is listed and nothing else. A file that has gone, with its image, is let go of.
func (k *keeper) keep(ctx context.Context, list []*shared) {
	wanted := map[fileKey]bool{}
	var sum int64
	mappings := 0
	for _, c := range list {
		if mappings += len(c.parts); mappings > maxKept || ctx.Err() != nil {
			break
		}
		if kept := k.keepOne(ctx, c); kept != nil {
			wanted[c.key] = true
			k.kept[c.key] = kept
			sum += kept.bytes
		}
	}
	for key, kept := range k.kept {
		if !wanted[key] {
			kept.letGo()
			delete(k.kept, key)
		}
	}
	k.f.metrics.kept.Set(float64(sum))
}

// keepOne keeps one file, or goes on keeping it. It is nil if the file is not there.
func (k *keeper) keepOne(ctx context.Context, c *shared) *keptFile {
	former := k.kept[c.key]
	roots := openRoots([]Layer{{DiffID: c.key.layer, Dir: c.dir}})
	defer closeRoots(roots)
	root := roots[c.key.layer]
	if root == nil {
		return nil
	}
	file, ok := openFile(root, c.key.path)
	if !ok {
		return nil
	}
	defer file.close()
	if former != nil && former.file == file.id && slices.Equal(former.parts, c.parts) && k.locked {
		return former
	}
	kept := &keptFile{file: file.id, parts: c.parts}
	for _, part := range c.parts {
		if part, ok := file.clip(part); ok {
			k.hold(ctx, file, kept, part)
		}
	}
	if former != nil {
		former.letGo()
	}
	return kept
}

// hold maps a part and locks it; reads it if that is not permitted.
func (k *keeper) hold(ctx context.Context, file layerFile, kept *keptFile, part span) {
	kept.bytes += part.length
	file.readAhead(ctx, part, adviseBytes(file.id.device)) // all of it at once, and not page by page
	if !k.locked {
		return
	}
	page := int64(unix.Getpagesize())
	start := part.offset / page * page
	area, err := unix.Mmap(file.fd, start, int(part.end()-start), unix.PROT_READ, unix.MAP_SHARED)
	if err == nil {
		if err = unix.Mlock(area); err == nil {
			kept.areas = append(kept.areas, area)
			return
		}
		_ = unix.Munmap(area)
	}
	k.locked = false
	k.f.cfg.Logger.Warn("memory cannot be locked: what images have in common is read again now and then instead", "error", err)
}
