package layer

import (
	"bytes"
	"cmp"
	"fmt"
	"iter"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer/erofs"
)

// implicitRoom is kept for the inode of a directory without an entry and its extended attributes, which it may have to adopt.
const implicitRoom = 512

const opaqueXattr = "trusted.overlay.opaque"

// finish writes the directories and the superblock. All content and all other inodes are in the file.
func (x *image) finish(res *Result) error {
	moved, err := x.applyLinks()
	if err != nil {
		return err
	}
	order := x.order()
	if err := x.place(order); err != nil {
		return err
	}
	if err := x.writeDirs(order, moved); err != nil {
		return err
	}
	if err := x.file.Truncate(x.space.next); err != nil {
		return fmt.Errorf("set size of the image: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(x.file.Fd()), &st); err != nil {
		return fmt.Errorf("stat the image: %w", err)
	}
	res.Bytes, res.Inodes = st.Blocks*512, x.inodes
	res.Timings.Write = x.space.writing.stage
	res.slots = map[string]uint64{}
	for _, id := range order {
		if d := x.names.dir(id); d.implicit {
			name := x.names.place(id)
			res.ImplicitDirs = append(res.ImplicitDirs, name)
			res.slots[name] = d.slot
		}
	}
	slices.Sort(res.ImplicitDirs)
	return nil
}

// applyLinks gives the inodes that hard links lead to their number of names, and what the links' own headers say. An inode that
// does not fit in its place any more moves.
func (x *image) applyLinks() (moved map[uint64]uint64, err error) {
	moved = map[uint64]uint64{}
	for _, slot := range slices.Sorted(maps.Keys(x.links)) {
		l := x.links[slot]
		if l.count == 0 {
			continue
		}
		to, err := x.applyLink(int64(slot)*erofs.SlotSize, l)
		if err != nil {
			return nil, err
		}
		moved[slot] = uint64(to) / erofs.SlotSize
	}
	return moved, nil
}

func (x *image) applyLink(at int64, l *links) (to int64, err error) {
	old, body, rest, err := readInode(x.file, at)
	if err != nil {
		return 0, err
	}
	had, err := erofs.GetXattrs(body)
	if err != nil {
		return 0, fmt.Errorf("read the image: %w", err)
	}
	var list []xattr
	for _, a := range had {
		if a.Name != capability { // lost with the change of owner
			list = append(list, xattr{a.Name, a.Value})
		}
	}
	kind := uint32(old.Mode) & unix.S_IFMT
	set, err := storable(l.xattrs, kind)
	if err != nil {
		return 0, err
	}
	if kind == unix.S_IFLNK {
		l.meta.mode = 0o777
	}
	xattrs, err := encodeXattrs(merge(list, set), l.meta.mode)
	if err != nil {
		return 0, err
	}
	ino := inodeOf(kind, l.meta)
	ino.Layout, ino.Size, ino.Start, ino.Links = old.Layout, old.Size, old.Start, l.count
	ino.XattrUnits = erofs.XattrUnits(xattrs)
	out := slices.Concat(make([]byte, erofs.InodeSize), xattrs, rest)
	ino.Put(out)
	if to = at; len(xattrs) != len(body) {
		if ino.Layout == erofs.Inline && len(out) > erofs.BlockSize {
			return 0, fmt.Errorf("%w: extended attributes of a hard link do not fit beside the content", ErrNoImage)
		}
		if to, err = x.space.reserve(int64(len(out))); err != nil {
			return 0, err
		}
	}
	return to, pwriteAll(int(x.file.Fd()), out, to)
}

// readInode reads an inode that is written: itself, its encoded attributes, and what follows them inline.
func readInode(file *os.File, at int64) (ino erofs.Inode, xattrs, rest []byte, err error) {
	b := make([]byte, erofs.InodeSize)
	if _, err := file.ReadAt(b, at); err != nil {
		return ino, nil, nil, fmt.Errorf("read the image: %w", err)
	}
	ino = erofs.GetInode(b)
	n := 0
	switch ino.Layout {
	case erofs.Inline:
		n = int(ino.Size % erofs.BlockSize)
	case erofs.Chunked:
		n = int(4 * ino.Chunks())
	}
	b = make([]byte, ino.XattrSize()+n)
	if _, err := file.ReadAt(b, at+erofs.InodeSize); err != nil {
		return ino, nil, nil, fmt.Errorf("read the image: %w", err)
	}
	return ino, b[:ino.XattrSize()], b[ino.XattrSize():], nil
}

// order lists the directories, each before what it holds, and sorts their entries.
func (x *image) order() []nodeID {
	order := []nodeID{rootNode}
	for i := 0; i < len(order); i++ {
		for _, e := range x.names.sort(order[i]) {
			if x.names.at(e).mode() == unix.S_IFDIR {
				order = append(order, e)
			}
		}
	}
	return order
}

// dirents are a directory's entries in their order. Before the directories have their places only the names are right.
func (x *image) dirents(id nodeID, moved map[uint64]uint64) iter.Seq[erofs.Dirent] {
	dots := []erofs.Dirent{
		{Name: []byte("."), Nid: x.names.dir(id).slot, Type: erofs.FileType(unix.S_IFDIR)},
		{Name: []byte(".."), Nid: x.names.dir(x.names.at(id).parent).slot, Type: erofs.FileType(unix.S_IFDIR)},
	}
	return func(yield func(erofs.Dirent) bool) {
		rest := dots
		for e := x.names.dir(id).first; e != 0; e = x.names.at(e).next {
			n, name := x.names.at(e), x.names.name(e)
			for len(rest) > 0 && bytes.Compare(rest[0].Name, name) < 0 {
				if !yield(rest[0]) {
					return
				}
				rest = rest[1:]
			}
			d := erofs.Dirent{Name: name, Nid: n.slot(), Type: erofs.FileType(uint16(n.mode()))}
			if n.mode() == unix.S_IFDIR {
				d.Nid = x.names.dir(e).slot
			} else if to, ok := moved[d.Nid]; ok {
				d.Nid = to
			}
			if !yield(d) {
				return
			}
		}
		for _, d := range rest {
			if !yield(d) {
				return
			}
		}
	}
}

// place finds room for the directories: first for all inodes, with the ends of their content, and then for whole blocks of it.
func (x *image) place(order []nodeID) error {
	at := x.space.next
	for _, id := range order {
		d := x.names.dir(id)
		var packer erofs.DirPacker
		for e := range x.dirents(id, nil) {
			packer.Add(len(e.Name))
		}
		d.size = packer.Size()
		list, err := storable(d.meta.xattrs, unix.S_IFDIR)
		if err != nil {
			return err
		}
		if d.opaque {
			list = append(list, xattr{opaqueXattr, "y"})
		}
		if d.xattrs, err = encodeXattrs(list, d.meta.mode); err != nil {
			return err
		}
		if id == rootNode {
			d.slot = erofs.RootOffset / erofs.SlotSize
			d.inline = erofs.RootOffset+erofs.InodeSize+len(d.xattrs)+d.tail() <= erofs.BlockSize
			continue
		}
		size := erofs.InodeSize + len(d.xattrs)
		if d.implicit {
			size = max(size, implicitRoom)
		} else if d.inline = size+d.tail() <= erofs.BlockSize; d.inline {
			size += d.tail()
		}
		if room := erofs.BlockSize - int(at%erofs.BlockSize); size > room {
			at += int64(room) % erofs.BlockSize
		}
		d.slot = uint64(at) / erofs.SlotSize
		at += (int64(size) + erofs.SlotSize - 1) &^ (erofs.SlotSize - 1)
	}
	if _, err := x.space.reserve(at - x.space.next); err != nil {
		return err
	}
	for _, id := range order {
		d := x.names.dir(id)
		start, err := x.space.reserve(d.size - int64(d.inlined()))
		if err != nil {
			return err
		}
		d.start = uint32(start / erofs.BlockSize)
	}
	return nil
}

// writeDirs writes the directories where they were placed, and the first block, with the root and the superblock.
func (x *image) writeDirs(order []nodeID, moved map[uint64]uint64) error {
	inodes, content := &runs{file: x.file}, &runs{file: x.file}
	first := make([]byte, erofs.BlockSize)
	for _, id := range order {
		d := x.names.dir(id)
		ino := inodeOf(unix.S_IFDIR, d.meta)
		ino.Size, ino.Start, ino.XattrUnits, ino.Links = d.size, d.start, erofs.XattrUnits(d.xattrs), 2
		if d.inline {
			ino.Layout = erofs.Inline
		}
		for e := x.names.dir(id).first; e != 0; e = x.names.at(e).next {
			if x.names.at(e).mode() == unix.S_IFDIR {
				ino.Links++
			}
		}
		body := append(make([]byte, erofs.InodeSize, erofs.BlockSize), d.xattrs...)
		tail, err := x.writeDirents(id, moved, content)
		if err != nil {
			return err
		}
		body = append(body, tail...)
		ino.Put(body)
		if id == rootNode {
			copy(first[erofs.RootOffset:], body)
		} else if err := inodes.write(body, int64(d.slot)*erofs.SlotSize); err != nil {
			return err
		}
	}
	if err := cmp.Or(inodes.flush(), content.flush()); err != nil {
		return err
	}
	erofs.PutSuper(first, erofs.Super{Inodes: x.inodes + 1, Blocks: x.space.next / erofs.BlockSize, Chunks: x.chunks})
	return pwriteAll(int(x.file.Fd()), first, 0)
}

// writeDirents writes the content of a directory, and gives the part of it that belongs beside the inode.
func (x *image) writeDirents(id nodeID, moved map[uint64]uint64, content *runs) (tail []byte, err error) {
	d := x.names.dir(id)
	block := make([]byte, erofs.BlockSize)
	at := int64(d.start) * erofs.BlockSize
	var packer erofs.DirPacker
	var group []erofs.Dirent
	for e := range x.dirents(id, moved) {
		if packer.Add(len(e.Name)) && len(group) > 0 {
			erofs.PutDirents(block, group)
			if err := content.write(block, at); err != nil {
				return nil, err
			}
			at, group = at+erofs.BlockSize, group[:0]
		}
		group = append(group, e)
	}
	n := erofs.PutDirents(block, group)
	if d.inline && n < erofs.BlockSize {
		return block[:n], nil
	}
	return nil, content.write(block, at)
}

// tail is the size of the last block of a directory's content if that is not full.
func (d *dirNode) tail() int { return int(d.size % erofs.BlockSize) }

// inlined is how much of it is beside the inode.
func (d *dirNode) inlined() int {
	if d.inline {
		return d.tail()
	}
	return 0
}

// runs writes pieces that follow one another closely, in large runs; what is between two pieces becomes zero.
type runs struct {
	file *os.File
	at   int64
	data []byte
}

func (r *runs) write(data []byte, at int64) error {
	if gap := at - r.at - int64(len(r.data)); len(r.data) > 0 && gap <= erofs.BlockSize && len(r.data) < outBytes {
		r.data = append(r.data, make([]byte, gap)...)
	} else {
		if err := r.flush(); err != nil {
			return err
		}
		r.at = at
	}
	r.data = append(r.data, data...)
	return nil
}

func (r *runs) flush() error {
	err := pwriteAll(int(r.file.Fd()), r.data, r.at)
	r.data = r.data[:0]
	return err
}
