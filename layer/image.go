package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"path"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer/erofs"
)

const (
	// maxTail is the end of a file up to which it is stored beside the inode: the content of a whole small file then costs what
	// it is long, and not a block. Longer ends save too little for what they cost to copy.
	maxTail = 3 << 10
	// maxChunks is how many chunks a file with holes has at most, so that their map fits beside the inode.
	maxChunks = 512
	// minChunk is the smallest chunk of such a file.
	minChunk = 64 << 10
	// capability is the attribute that a change of owner takes away.
	capability = "security.capability"
)

// image makes the tree as one EROFS image. Content goes to the file as it comes, and each inode as soon as its content is there;
// only the names stay in memory until the end, when the directories and the superblock are written.
type image struct {
	*parser
	names *names
	space *space
	file  *os.File

	now     unix.Timespec // of the entry that is being added: when what it implies was made
	body    []byte        // of the inode that is being made
	inodes  int64
	charged int64
	chunks  bool
	links   map[uint64]*links // by slot, of inodes that a hard link leads to
}

// links is what hard links say of an inode that is written already.
type links struct {
	count  uint32
	meta   meta
	xattrs []xattr
}

func newImage(p *parser, name string) (sink, error) {
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	x := &image{
		parser: p, names: newNames(), space: newSpace(p, file), file: file,
		body: make([]byte, 0, erofs.BlockSize), links: map[uint64]*links{},
	}
	x.names.implied, x.names.charge = x.imply, x.charge
	return x, nil
}

func (x *image) close() {
	x.p.u.names.Add(-x.charged)
	_ = x.file.Close() // whoever wants it durable syncs it
}

// charge accounts for memory that is kept to the end. All images in the making share one budget.
func (x *image) charge(bytes int64) error {
	x.charged += bytes
	if limit := x.p.u.namesBytes; x.p.u.names.Add(bytes) > limit {
		return fmt.Errorf("%w: the names of all layers in the making take over %d bytes", ErrNoImage, limit)
	}
	return nil
}

func (x *image) write(ctx context.Context, g *errgroup.Group) {
	g.Go(func() error { return x.space.run(ctx) })
}

func (x *image) end() error {
	if err := x.space.flush(); err != nil {
		return err
	}
	close(x.space.pieces)
	return nil
}

func (x *image) add(e *entry) error {
	x.now = timespec(e.ModTime)
	d, err := x.names.lookup(e.parent, makeMissing)
	if err != nil {
		return err
	}
	m, err := metaOf(e.Header)
	if err != nil {
		return err
	}
	if strings.HasPrefix(e.base, whiteout) {
		return x.whiteout(d, m, e)
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

// claim gives the node for a new entry, taking away what an earlier one made there.
func (x *image) claim(d nodeID, base string) (nodeID, error) {
	id := x.names.get(d, base)
	if id == 0 {
		return x.names.put(d, base)
	}
	x.remove(id)
	return id, nil
}

func (x *image) remove(id nodeID) {
	n := x.names.at(id)
	switch n.mode() {
	case unix.S_IFDIR:
		x.names.forget()
		for _, child := range x.names.entries(id) {
			x.remove(child)
		}
		x.inodes--
	case unix.S_IFLNK:
		x.names.forget()
		delete(x.names.targets, id)
		fallthrough
	default:
		if l := x.links[n.slot()]; l == nil {
			x.inodes--
		} else if l.count--; l.count == 0 {
			x.inodes--
		}
	}
	n.kind = 0
}

// imply makes a directory because a path needs it.
func (x *image) imply(at nodeID, base string) error {
	id, err := x.names.put(at, base)
	if err != nil {
		return err
	}
	if err := x.charge(dirBytes); err != nil {
		return err
	}
	x.names.addDir(id, meta{mode: 0o755, mtime: x.now}).implicit = true
	x.inodes++
	return x.keepText(x.names.place(id))
}

func (x *image) directory(d nodeID, m meta, e *entry) error {
	kept := int64(dirBytes)
	for i, a := range m.xattrs { // they are parts of a larger text
		m.xattrs[i] = xattr{strings.Clone(a.name), strings.Clone(a.value)}
		kept += int64(len(a.name) + len(a.value))
	}
	if err := x.charge(kept); err != nil {
		return err
	}
	if _, err := storable(m.xattrs, unix.S_IFDIR); err != nil {
		return err
	}
	if id := x.names.get(d, e.base); id != 0 && x.names.at(id).mode() == unix.S_IFDIR {
		dir := x.names.dir(id)
		m.xattrs = merge(dir.meta.xattrs, m.xattrs)
		dir.meta, dir.implicit = m, false
		return nil
	}
	id, err := x.claim(d, e.base)
	if err != nil {
		return err
	}
	x.names.addDir(id, m)
	x.inodes++
	return x.keepText(e.name)
}

// begin encodes an inode, and what follows it but for content, to body. Its content's layout is for the caller to say.
func (x *image) begin(kind uint32, m meta, size int64) (erofs.Inode, error) {
	list, err := storable(m.xattrs, kind)
	if err != nil {
		return erofs.Inode{}, err
	}
	xattrs, err := encodeXattrs(list, m.mode)
	if err != nil {
		return erofs.Inode{}, err
	}
	x.body = append(x.body[:0], make([]byte, erofs.InodeSize)...)
	x.body = append(x.body, xattrs...)
	ino := inodeOf(kind, m)
	ino.Links, ino.Size, ino.XattrUnits = 1, size, erofs.XattrUnits(xattrs)
	return ino, nil
}

func inodeOf(kind uint32, m meta) erofs.Inode {
	return erofs.Inode{
		Mode: uint16(kind | m.mode), UID: uint32(m.uid), GID: uint32(m.gid),
		Seconds: m.mtime.Sec, Nanos: uint32(m.mtime.Nsec),
	}
}

// commit writes the inode that is in body, and makes it the node's.
func (x *image) commit(id nodeID, ino erofs.Inode) error {
	ino.Put(x.body)
	var at int64
	if len(x.body) <= erofs.BlockSize {
		var into []byte
		var err error
		if at, into, err = x.space.share(len(x.body)); err != nil {
			return err
		}
		copy(into, x.body)
	} else {
		var err error
		if at, err = x.space.reserve(int64(len(x.body))); err != nil {
			return err
		}
		if err := pwriteAll(int(x.file.Fd()), x.body, at); err != nil {
			return err
		}
	}
	n := x.names.at(id)
	n.kind = uint8(ino.Mode >> 12)
	n.setSlot(uint64(at) / erofs.SlotSize)
	x.inodes++
	return nil
}

func (x *image) regular(d nodeID, m meta, e *entry) error {
	id, err := x.claim(d, e.base)
	if err != nil {
		return err
	}
	ino, err := x.begin(unix.S_IFREG, m, e.Size)
	if err != nil {
		return err
	}
	if e.sparse() {
		return x.sparse(id, ino)
	}
	tail := int(e.Size % erofs.BlockSize)
	if tail > maxTail || len(x.body)+tail > erofs.BlockSize {
		tail = 0
	}
	at, err := x.content(e.Size - int64(tail))
	if err != nil {
		return err
	}
	ino.Start = uint32(at / erofs.BlockSize)
	if tail > 0 {
		ino.Layout = erofs.Inline
		n := len(x.body)
		x.body = x.body[:n+tail]
		if err := x.copy(x.body[n:]); err != nil {
			return err
		}
	}
	return x.commit(id, ino)
}

// copy reads content of the entry.
func (x *image) copy(into []byte) error {
	for len(into) > 0 {
		data, b, err := x.r.take(int64(len(into)))
		if err != nil {
			return short(err)
		}
		into = into[copy(into, data):]
		b.release()
	}
	return nil
}

// content passes whole blocks of an entry's content on, and says where they go.
func (x *image) content(size int64) (at int64, err error) {
	switch {
	case size == 0:
		return 0, nil
	case size < directBytes:
		at, into, err := x.space.gather(size)
		if err != nil {
			return 0, err
		}
		return at, x.copy(into)
	}
	if err := x.space.flushContent(); err != nil {
		return 0, err
	}
	if at, err = x.space.reserve(size); err != nil {
		return 0, err
	}
	for done := int64(0); done < size; {
		data, b, err := x.r.take(size - done)
		if err != nil {
			return 0, short(err)
		}
		if err := x.space.send(piece{at: at + done, data: data, block: b}); err != nil {
			return 0, err
		}
		done += int64(len(data))
	}
	return at, nil
}

// sparse writes a file with holes, in chunks of which those without content take no room. They are rare, so the parser does it
// alone.
func (x *image) sparse(id nodeID, ino erofs.Inode) error {
	x.logical += ino.Size
	if err := x.p.bounded(x.logical); err != nil {
		return err
	}
	chunk := int64(minChunk)
	if least := (ino.Size + maxChunks - 1) / maxChunks; least > chunk {
		chunk = 1 << bits.Len64(uint64(least-1))
	}
	starts := make([]int64, (ino.Size+chunk-1)/chunk)
	if err := x.sparseContent(ino.Size, chunk, starts); err != nil {
		return err
	}
	if len(starts) > 0 {
		ino.Layout, ino.Start, x.chunks = erofs.Chunked, erofs.ChunkFormat(chunk/erofs.BlockSize), true
	}
	n := len(x.body)
	x.body = append(x.body, make([]byte, 4*len(starts))...)
	for i, at := range starts {
		erofs.PutChunk(x.body[n:], i, uint32(at/erofs.BlockSize))
	}
	return x.commit(id, ino)
}

func (x *image) sparseContent(size, chunk int64, starts []int64) error {
	buf := make([]byte, minChunk)
	for at := int64(0); ; {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(x.tr, buf)
		if data := buf[:n]; !zero(data) {
			start := &starts[at/chunk]
			if *start == 0 {
				var err error
				if *start, err = x.space.reserve(chunk); err != nil {
					return err
				}
			}
			if err := pwriteAll(int(x.file.Fd()), data, *start+at%chunk); err != nil {
				return err
			}
		}
		at += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF && at == size {
			return nil
		} else if err != nil {
			return &refusal{reason: "its sparse content", err: err}
		}
	}
}

func (x *image) symlink(d nodeID, m meta, e *entry) error {
	target, err := e.linkTarget()
	if err != nil {
		return err
	}
	if len(target) >= unix.PathMax {
		return &refusal{reason: "make symbolic link", err: unix.ENAMETOOLONG}
	}
	id, err := x.claim(d, e.base)
	if err != nil {
		return err
	}
	m.mode = 0o777
	ino, err := x.begin(unix.S_IFLNK, m, int64(len(target)))
	if err != nil {
		return err
	}
	if len(x.body)+len(target) <= erofs.BlockSize {
		ino.Layout = erofs.Inline
		x.body = append(x.body, target...)
	} else {
		at, into, err := x.space.gather(ino.Size)
		if err != nil {
			return err
		}
		copy(into, target)
		ino.Start = uint32(at / erofs.BlockSize)
	}
	if err := x.charge(int64(len(target)) + 64); err != nil {
		return err
	}
	x.names.targets[id] = strings.Clone(target)
	return x.commit(id, ino)
}

func (x *image) special(d nodeID, m meta, e *entry) error {
	kind, dev, err := e.device()
	if err != nil {
		return err
	}
	id, err := x.claim(d, e.base)
	if err != nil {
		return err
	}
	ino, err := x.begin(kind, m, 0)
	if err != nil {
		return err
	}
	if kind != unix.S_IFIFO {
		ino.Start = uint32(dev) // as much as mknod(2) takes
	}
	return x.commit(id, ino)
}

// whiteout hides something of the lower layers, in overlayfs's way.
func (x *image) whiteout(d nodeID, m meta, e *entry) error {
	if e.base == opaque {
		x.names.dir(d).opaque = true
		return nil
	}
	hidden, err := e.hidden()
	if err != nil {
		return err
	}
	if x.names.get(d, hidden) != 0 {
		return refuse("white-out of what the layer itself holds")
	}
	id, err := x.names.put(d, hidden)
	if err != nil {
		return err
	}
	m.mode, m.xattrs = 0, nil
	ino, err := x.begin(unix.S_IFCHR, m, 0)
	if err != nil {
		return err
	}
	return x.commit(id, ino)
}

// hardlink links to an earlier file of the layer. Like containerd it then applies the link's own header to the shared inode.
func (x *image) hardlink(d nodeID, m meta, e *entry) error {
	clean, err := e.hardlinkTarget()
	if err != nil {
		return err
	}
	parent, base := path.Split(clean)
	td, err := x.names.lookup(strings.TrimSuffix(parent, "/"), failMissing)
	if errors.Is(err, unix.ENOENT) {
		return e.hardlinkBelow()
	} else if err != nil {
		return err
	}
	if td == d && base == e.base {
		return refuse("hard link to itself")
	}
	id, err := x.claim(d, e.base)
	if err != nil {
		return err
	}
	target := x.names.get(td, base)
	if target == 0 {
		return e.hardlinkBelow()
	}
	from, n := x.names.at(target), x.names.at(id)
	if from.mode() == unix.S_IFDIR {
		return refuse("hard link to %q, which is a directory", e.Linkname)
	}
	if _, err := storable(m.xattrs, from.mode()); err != nil {
		return err
	}
	n.kind, n.ref, n.hi = from.kind, from.ref, from.hi
	if to, ok := x.names.targets[target]; ok {
		x.names.targets[id] = to
	}
	l := x.links[n.slot()]
	if l == nil {
		l = &links{count: 1}
		x.links[n.slot()] = l
	}
	l.count++
	kept := int64(64 + 128)
	for _, a := range m.xattrs {
		kept += int64(len(a.name) + len(a.value))
		l.xattrs = merge(l.xattrs, []xattr{{strings.Clone(a.name), strings.Clone(a.value)}})
	}
	m.xattrs = nil
	l.meta = m
	return x.charge(kept)
}

// merge sets attributes on top of others.
func merge(old, set []xattr) []xattr {
	out := old[:len(old):len(old)]
next:
	for _, a := range set {
		for i := range out {
			if out[i].name == a.name {
				out = append([]xattr(nil), out...)
				out[i] = a
				continue next
			}
		}
		out = append(out, a)
	}
	return out
}
