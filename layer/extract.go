package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// batchFiles is how many small files a writer takes at a time; with the end of a block a batch ends anyway.
	batchFiles = 64
	// seenBits sizes the filter of names that exist; full, it costs a lookup for each entry, never correctness.
	seenBits = 1 << 21
	// pathBytesPerEntry bounds, times the limit of entries, the text kept of directories until the end.
	pathBytesPerEntry = 16
)

// extractor makes the tree as a directory. It makes everything but the content of regular files itself, in the tar's order, and
// hands those to the writers. It knows which files are still under way, and waits for one when a later entry needs its place.
type extractor struct {
	*parser
	tree    *tree
	writers []writer

	jobs    chan *batch
	batch   *batch             // being filled
	sent    []*batch           // not known to be done, oldest first
	pending map[pathKey]*batch // where files of batch and sent go

	seed maphash.Seed
	seen []uint64 // Bloom filter of names in the tree

	inodes, bytes int64
	dirTimes      []dirTime
	implicit      map[string]struct{}
}

// dirTime is set when the directory has all its entries.
type dirTime struct {
	path         string
	atime, mtime unix.Timespec
}

func newExtractor(p *parser, root string) (sink, error) {
	t, err := openTree(root)
	if err != nil {
		return nil, err
	}
	n := p.p.u.writers
	x := &extractor{
		parser: p, tree: t, writers: make([]writer, n),
		jobs: make(chan *batch, 2*n), batch: &batch{done: make(chan struct{})}, pending: map[pathKey]*batch{},
		seed: maphash.MakeSeed(), seen: make([]uint64, seenBits/64), implicit: map[string]struct{}{},
	}
	t.arrive, t.implied = x.arrive, x.imply
	p.r.before = x.flush
	return x, nil
}

func (x *extractor) close() { x.tree.close() }

// write starts the writers.
func (x *extractor) write(ctx context.Context, g *errgroup.Group) {
	for i := range x.writers {
		g.Go(func() error { return x.writers[i].run(ctx, x) })
	}
}

// add unpacks one entry of the tar.
func (x *extractor) add(e *entry) error {
	d, err := x.tree.lookup(e.parent, makeMissing)
	if err != nil {
		return err
	}
	defer d.release()
	if strings.HasPrefix(e.base, whiteout) {
		return x.whiteout(d, e)
	}
	m, err := metaOf(e.Header)
	if err != nil {
		return err
	}
	switch e.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return x.regular(d, m, e)
	case tar.TypeDir:
		return x.directory(d, m, e)
	case tar.TypeSymlink:
		return x.symlink(d, m, e)
	case tar.TypeLink:
		return x.hardlink(d, m, e)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return x.special(d, m, e)
	default:
		return refuse("its type %q is not known", e.Typeflag)
	}
}

// end lets the writers end.
func (x *extractor) end() error {
	close(x.jobs)
	return nil
}

// arrive waits until a file on its way to this place is written.
func (x *extractor) arrive(key pathKey) error {
	b := x.pending[key]
	if b == nil {
		return nil
	}
	if err := x.flush(); err != nil {
		return err
	}
	return x.wait(b)
}

func (x *extractor) wait(b *batch) error {
	x.clock.pause()
	defer x.clock.resume()
	select {
	case <-b.done:
		return nil
	case <-x.ctx.Done():
		return x.ctx.Err()
	}
}

// settle waits for all files on their way.
func (x *extractor) settle() error {
	if err := x.flush(); err != nil {
		return err
	}
	for _, b := range x.sent {
		if err := x.wait(b); err != nil {
			return err
		}
	}
	return nil
}

// flush hands the batch to the writers, and forgets those that are done.
func (x *extractor) flush() error {
	for len(x.sent) > 0 {
		select {
		case <-x.sent[0].done:
			for _, key := range x.sent[0].keys {
				if x.pending[key] == x.sent[0] {
					delete(x.pending, key)
				}
			}
			x.sent = x.sent[1:]
			continue
		default:
		}
		break
	}
	b := x.batch
	if len(b.files) == 0 {
		return nil
	}
	x.clock.pause()
	defer x.clock.resume()
	select {
	case x.jobs <- b:
	case <-x.ctx.Done():
		return x.ctx.Err()
	}
	x.sent = append(x.sent, b)
	x.batch = &batch{done: make(chan struct{})}
	return nil
}

// imply notes a directory that is made because a path needs it.
func (x *extractor) imply(key pathKey) error {
	x.mark(key)
	x.inodes++
	name := path.Join(key.dir, key.base)
	x.implicit[name] = struct{}{}
	return x.keepText(name)
}

// mark notes a name as existing, and says whether it may have existed before.
func (x *extractor) mark(key pathKey) (before bool) {
	h := maphash.Comparable(x.seed, key)
	one, two := h%seenBits, (h>>32)%seenBits
	before = x.seen[one/64]&(1<<(one%64)) != 0 && x.seen[two/64]&(1<<(two%64)) != 0
	x.seen[one/64] |= 1 << (one % 64)
	x.seen[two/64] |= 1 << (two % 64)
	return before
}

// finish sets what had to wait for the directories' entries. The writers have ended.
func (x *extractor) finish(res *Result) error {
	for _, dt := range x.dirTimes {
		parent, base := path.Split(dt.path)
		d, err := x.tree.lookup(strings.TrimSuffix(parent, "/"), failMissing)
		var gone *refusal
		if errors.Is(err, unix.ENOENT) || errors.As(err, &gone) {
			continue // replaced by a later entry
		} else if err != nil {
			return err
		}
		err = setTimesAt(d.fd, base, dt.atime, dt.mtime)
		d.release()
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s: %w", dt.path, err)
		}
	}
	res.ImplicitDirs = slices.Sorted(maps.Keys(x.implicit))
	res.Bytes, res.Inodes = x.bytes, x.inodes
	for i := range x.writers {
		res.Bytes += x.writers[i].bytes
		res.Inodes += x.writers[i].inodes
		res.Timings.Write.merge(x.writers[i].clock.stage)
	}
	return nil
}

// remove takes away what an earlier entry of the layer made.
func (x *extractor) remove(d *dir, base string, kind uint32) error {
	if kind == unix.S_IFDIR || kind == unix.S_IFLNK {
		x.tree.forget()
	}
	if kind != unix.S_IFDIR {
		if err := unix.Unlinkat(d.fd, base, 0); err != nil {
			return fmt.Errorf("replace: %w", err)
		}
		return nil
	}
	if err := x.settle(); err != nil {
		return err
	}
	name := d.join(base)
	maps.DeleteFunc(x.implicit, func(p string, _ struct{}) bool { return p == name || strings.HasPrefix(p, name+"/") })
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", d.fd))
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	defer root.Close()
	if err := root.RemoveAll(base); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	return nil
}
