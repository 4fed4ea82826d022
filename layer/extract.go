package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

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

// extractor parses the tar. It makes everything but the content of regular files itself, in the tar's order, and hands those
// to the writers. It knows which files are still under way, and waits for one when a later entry needs its place.
type extractor struct {
	ctx   context.Context
	p     *pipeline
	clock clock
	tree  *tree
	r     *blockReader
	tr    *tar.Reader

	jobs    chan *batch
	batch   *batch             // being filled
	sent    []*batch           // not known to be done, oldest first
	pending map[pathKey]*batch // where files of batch and sent go

	seed maphash.Seed
	seen []uint64 // Bloom filter of names in the tree

	entries, inodes, bytes int64
	logical                int64 // bytes of sparse files beyond what was in the tar
	pathBytes              int64
	dirTimes               []dirTime
	implicit               map[string]struct{}
}

// dirTime is set when the directory has all its entries.
type dirTime struct {
	path         string
	atime, mtime unix.Timespec
}

func newExtractor(ctx context.Context, p *pipeline, root string) (*extractor, error) {
	t, err := openTree(root)
	if err != nil {
		return nil, err
	}
	x := &extractor{
		ctx: ctx, p: p, tree: t,
		jobs: make(chan *batch, 2*p.u.writers), batch: &batch{done: make(chan struct{})}, pending: map[pathKey]*batch{},
		seed: maphash.MakeSeed(), seen: make([]uint64, seenBits/64), implicit: map[string]struct{}{},
	}
	t.arrive, t.implied = x.arrive, x.imply
	x.r = &blockReader{ctx: ctx, blocks: p.toParse, clock: &x.clock, before: x.flush}
	x.tr = tar.NewReader(x.r)
	return x, nil
}

func (x *extractor) close() { x.tree.close() }

// parse reads the tar to the end of the stream.
func (x *extractor) parse() error {
	x.clock.start()
	defer x.clock.stop()
	layer := x.p.spec.Digest
	for {
		hdr, err := x.tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return x.broken(err)
		}
		if x.entries++; x.entries > x.p.u.limits.MaxEntries {
			return x.p.corrupt(nil, "it has more than %d entries; if it is meant to, raise --layer-max-entries", x.p.u.limits.MaxEntries)
		}
		if err := x.entry(hdr); err != nil {
			if x.ctx.Err() != nil {
				return x.ctx.Err()
			}
			return corruptEntry(layer, hdr.Name, err)
		}
	}
	if err := x.r.drain(); err != nil {
		return err
	}
	close(x.jobs)
	return nil
}

// broken tells a stream that was cut off from outside from a tar that is broken in itself.
func (x *extractor) broken(err error) error {
	if cerr := x.ctx.Err(); cerr != nil {
		return cerr
	}
	return x.p.corrupt(err, "tar breaks after %d entries", x.entries)
}

// entry unpacks one entry of the tar.
func (x *extractor) entry(hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil || name == "." || aufsMeta(name) {
		return err
	}
	parent, base := "", name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		parent, base = name[:i], name[i+1:]
	}
	d, err := x.tree.lookup(parent, makeMissing)
	if err != nil {
		return err
	}
	defer d.release()
	if strings.HasPrefix(base, whiteout) {
		return x.whiteout(d, base, hdr)
	}
	m, err := metaOf(hdr)
	if err != nil {
		return err
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return x.regular(d, base, m, hdr)
	case tar.TypeDir:
		return x.directory(d, base, name, m)
	case tar.TypeSymlink:
		return x.symlink(d, base, m, hdr.Linkname)
	case tar.TypeLink:
		return x.hardlink(d, base, m, hdr.Linkname)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return x.special(d, base, m, hdr)
	default:
		return refuse("its type %q is not known", hdr.Typeflag)
	}
}

// cleanName checks a name of the tar and gives it without ".", ".." and slashes too many; "." is the root.
func cleanName(name string) (string, error) {
	switch {
	case name == "":
		return "", refuse("it has no name")
	case strings.IndexByte(name, 0) >= 0:
		return "", refuse("its name contains a NUL")
	case len(name) > maxPath:
		return "", refuse("its name has %d bytes, more than %d", len(name), maxPath)
	case name[0] == '/':
		return "", refuse("its name is an absolute path")
	}
	name = path.Clean(name)
	if name == ".." || strings.HasPrefix(name, "../") {
		return "", refuse("its name climbs out of the layer")
	}
	return name, nil
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

// keepText accounts for text that is kept to the end.
func (x *extractor) keepText(s string) error {
	x.pathBytes += int64(len(s)) + 48
	if limit := x.p.u.limits.MaxEntries * pathBytesPerEntry; x.pathBytes > max(limit, 1<<20) {
		return refuse("the directories' names take over %d bytes; if they are meant to, raise --layer-max-entries", limit)
	}
	return nil
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
func (x *extractor) finish() error {
	x.clock.resume()
	defer x.clock.stop()
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
	return nil
}

func (x *extractor) result() *Result {
	implicit := slices.Sorted(maps.Keys(x.implicit))
	return &Result{Bytes: x.bytes, Inodes: x.inodes, ImplicitDirs: implicit, Timings: Timings{Tar: x.clock.stage}}
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
