package erofs

import "encoding/binary"

// Dirent is an entry of a directory. The entries of a directory, "." and ".." among them, are sorted by their bytes.
type Dirent struct {
	Name []byte
	Nid  uint64
	Type byte // the S_IFMT of its inode, as FileType gives it
}

// FileType is the type of a dirent for an inode's mode.
func FileType(mode uint16) byte {
	switch mode >> 12 {
	case 8:
		return 1 // regular file
	case 4:
		return 2 // directory
	case 2:
		return 3 // character device
	case 6:
		return 4 // block device
	case 1:
		return 5 // FIFO
	case 12:
		return 6 // socket
	case 10:
		return 7 // symbolic link
	}
	return 0
}

// DirPacker packs entries into the blocks of a directory. The zero value is an empty directory.
type DirPacker struct {
	blocks int64
	used   int
}

// Add makes room for the next entry's name, and says whether it begins a new block.
func (p *DirPacker) Add(nameLen int) (begins bool) {
	need := direntSize + nameLen
	if p.blocks == 0 || p.used+need > BlockSize {
		p.blocks, p.used, begins = p.blocks+1, 0, true
	}
	p.used += need
	return begins
}

// Size is the size of the directory.
func (p *DirPacker) Size() int64 {
	if p.blocks == 0 {
		return 0
	}
	return (p.blocks-1)*BlockSize + int64(p.used)
}

// PutDirents encodes the entries of one block of a directory to b, and gives how much of it they fill; the rest is zero.
func PutDirents(b []byte, entries []Dirent) int {
	le := binary.LittleEndian
	name := direntSize * len(entries)
	for i, e := range entries {
		at := b[direntSize*i:]
		le.PutUint64(at[0:], e.Nid)
		le.PutUint16(at[8:], uint16(name))
		at[10], at[11] = e.Type, 0
		name += copy(b[name:], e.Name)
	}
	clear(b[name:])
	return name
}
