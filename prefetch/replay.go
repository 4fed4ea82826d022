package prefetch

import (
	"context"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// readers read at once: what costs on a cold disk are the waits, for names and inodes most of all, and they are one after another
	// for each.
	readers = 8
	// sample is of how many steps it is looked first whether all of it is in memory: then there is nothing to do, and no more than
	// some 100 µs are spent on finding that out. Steps are chosen at random, so that a hole that one start leaves the next may find.
	sample = 24
	// replayTime bounds a replay.
	replayTime = 30 * time.Second
	// maxRemembered bounds the spans of a report.
	maxRemembered = maxRanges
)

// report is what a replay has done. It is compared with what the start that it was for has needed.
type report struct {
	begun time.Time

	mu          sync.Mutex // guards what follows
	hits, ahead int64      // bytes: in memory already, and asked for
	files       map[fileID]fileKey
	spans       map[fileID][]readSpan
	count       int
}

// readSpan is one of which a part was not in memory.
type readSpan struct {
	span
	missing int64
}

func newReport() *report {
	return &report{begun: time.Now(), files: map[fileID]fileKey{}, spans: map[fileID][]readSpan{}}
}

// read notes what was asked for of a file.
func (r *report) read(id fileID, key fileKey, hits int64, list []readSpan) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hits += hits
	for _, s := range list {
		r.ahead += s.missing
	}
	if r.count += 1 + len(list); r.count > maxRemembered {
		return
	}
	r.files[id] = key
	if len(list) > 0 {
		r.spans[id] = append(r.spans[id], list...)
	}
}

// inMemory notes that all was there.
func (r *report) inMemory(bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hits += bytes
}

// replay is one that goes on.
type replay struct {
	roots  map[digest.Digest]*os.File
	left   atomic.Int64 // bytes of the budget
	report *report
	parts  sync.Map // adviseBytes by device
}

// openRoots opens an image's layers; those that are not there are left out.
func openRoots(layers []Layer) map[digest.Digest]*os.File {
	roots := make(map[digest.Digest]*os.File, len(layers))
	for _, l := range layers {
		if roots[l.DiffID] != nil {
			continue
		}
		if f, err := os.OpenFile(l.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			roots[l.DiffID] = f
		}
	}
	return roots
}

func closeRoots(roots map[digest.Digest]*os.File) {
	for _, f := range roots {
		_ = f.Close() // it was only looked through
	}
}

// run reads what next gives, until that has no more, the budget is used up or ctx ends.
func (r *replay) run(ctx context.Context, next func() (step, bool)) {
	var workers sync.WaitGroup
	for range readers {
		workers.Go(func() {
			aside(0, func() {
				for ctx.Err() == nil && r.left.Load() > 0 {
					s, ok := next()
					if !ok {
						return
					}
					r.do(ctx, s)
				}
			})
		})
	}
	workers.Wait()
}

// inMemory tells whether all of some steps is in memory, of a list, as far as a sample tells.
func (r *replay) inMemory(steps []step) bool {
	for range min(sample, len(steps)) {
		s := steps[rand.IntN(len(steps))]
		f, ok := r.open(s)
		if !ok {
			continue // it is not in this layer, and nothing could be done about it
		}
		for _, part := range s.ranges {
			if part, ok = f.clip(part); ok && f.missing(part) > 0 {
				f.close()
				return false
			}
		}
		f.close()
	}
	return true
}

// do reads one step.
func (r *replay) do(ctx context.Context, s step) {
	f, ok := r.open(s)
	if !ok {
		return
	}
	defer f.close()
	var hits int64
	var list []readSpan
	for _, part := range s.ranges {
		part, ok := f.clip(part)
		if !ok {
			continue
		}
		missing := f.missing(part)
		hits += part.length - missing
		if missing == 0 {
			continue
		}
		granted := r.take(missing)
		if granted < missing { // the budget is used up
			part.length = min(part.length, granted)
		}
		f.readAhead(ctx, part, r.part(f.id.device))
		list = append(list, readSpan{part, granted})
	}
	r.report.read(f.id, fileKey{s.layer, s.path}, hits, list)
}

// take takes bytes from the budget, as many as there are.
func (r *replay) take(bytes int64) int64 {
	if left := r.left.Add(-bytes); left < 0 {
		return max(bytes+left, 0)
	}
	return bytes
}

func (r *replay) part(device uint64) int64 {
	if part, ok := r.parts.Load(device); ok {
		return part.(int64)
	}
	part := adviseBytes(device)
	r.parts.Store(device, part)
	return part
}

// open opens a step's file below its layer; it is false for whatever is not a regular file there.
func (r *replay) open(s step) (layerFile, bool) {
	root := r.roots[s.layer]
	if root == nil {
		return layerFile{}, false
	}
	return openFile(root, s.path)
}

// whole reads all regular files of all layers, base first.
func (r *replay) whole(ctx context.Context, layers []Layer) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	found := make(chan step)
	go func() {
		defer close(found)
		budget := maxEntries
		for _, l := range layers {
			walk(l, &budget, func(name string, _ uint64) bool {
				select {
				case found <- step{l.DiffID, name, []span{{0, maxOffset}}}:
					return true
				case <-ctx.Done():
					return false
				}
			})
		}
	}()
	r.run(ctx, func() (step, bool) {
		s, ok := <-found
		return s, ok
	})
	cancel()
	for range found { // until the walk has ended
	}
}
