// Package erofs encodes what an EROFS image is made of: superblock, inodes, extended attributes and directories, as Linux's
// Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h describe them. It knows the part of the format that stores files as
// they are: blocks of 4 KiB, extended inodes, no compression. Where things go in an image is its user's affair; layer decides it,
// and so the package has more names than most: one for each part of the format.
//
// An inode is addressed by its nid, which is its offset in the image in units of SlotSize: the images have no area of their own
// for inodes, so that one can be written beside its content while a layer streams in.
package erofs

import (
	"encoding/binary"
	"hash/crc32"
)

const (
	// BlockSize is the size of a block, and the largest that an inode with what follows it inline may be.
	BlockSize = 4096
	// SlotSize is the unit in which nids count, and to which inodes are aligned.
	SlotSize = 32
	// InodeSize is the size of an extended inode.
	InodeSize = 64
	// RootOffset is where the root's inode is: behind the superblock, as its nid has only 16 bits.
	RootOffset = superOffset + superSize
	// MaxBlocks is how many blocks an image can have.
	MaxBlocks = 1<<32 - 1

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xe0f5e1e2

	compatChecksum    = 1 << 0
	compatMtime       = 1 << 1
	incompatChunks    = 1 << 2
	extended          = 1 // in an inode's format
	blockBits         = 12
	maxXattrUnits     = 1<<16 - 2
	xattrHeaderSize   = 12
	xattrEntrySize    = 4
	direntSize        = 12
	chunkBitsMask     = 1<<5 - 1
	nullBlock         = 1<<32 - 1
	maxXattrValueSize = 1<<16 - 1
)

// Layout says where an inode's content is.
type Layout uint8

const (
	// Plain content lies in consecutive blocks from Inode.Start.
	Plain Layout = 0
	// Inline content lies in consecutive blocks, except for what is left of the last one, which follows the inode and its
	// extended attributes within their block.
	Inline Layout = 2
	// Chunked content lies in chunks, whose first blocks are listed behind the inode. A chunk may be a hole.
	Chunked Layout = 4
)

// Inode is an inode as the image stores it. Its number is its place.
type Inode struct {
	Mode       uint16 // with the file type, as in stat(2)
	Layout     Layout
	UID, GID   uint32
	Seconds    int64 // of the modification time
	Nanos      uint32
	Links      uint32
	Size       int64
	Start      uint32 // first block, or device number, or ChunkFormat
	XattrUnits uint16 // XattrUnits of what follows the inode
}

// Put writes the inode to the first InodeSize bytes of b.
func (i *Inode) Put(b []byte) {
	clear(b[:InodeSize])
	le := binary.LittleEndian
	le.PutUint16(b[0:], uint16(i.Layout)<<1|extended)
	le.PutUint16(b[2:], i.XattrUnits)
	le.PutUint16(b[4:], i.Mode)
	le.PutUint64(b[8:], uint64(i.Size))
	le.PutUint32(b[16:], i.Start)
	le.PutUint32(b[24:], i.UID)
	le.PutUint32(b[28:], i.GID)
	le.PutUint64(b[32:], uint64(i.Seconds))
	le.PutUint32(b[40:], i.Nanos)
	le.PutUint32(b[44:], i.Links)
}

// GetInode reads what Put wrote.
func GetInode(b []byte) Inode {
	le := binary.LittleEndian
	return Inode{
		Layout: Layout(le.Uint16(b[0:]) >> 1 & 7), XattrUnits: le.Uint16(b[2:]), Mode: le.Uint16(b[4:]),
		Size: int64(le.Uint64(b[8:])), Start: le.Uint32(b[16:]), UID: le.Uint32(b[24:]), GID: le.Uint32(b[28:]),
		Seconds: int64(le.Uint64(b[32:])), Nanos: le.Uint32(b[40:]), Links: le.Uint32(b[44:]),
	}
}

// XattrSize is how many bytes of extended attributes follow the inode.
func (i *Inode) XattrSize() int {
	if i.XattrUnits == 0 {
		return 0
	}
	return xattrHeaderSize + (int(i.XattrUnits)-1)*4
}

// Chunks is how many chunks a chunked file has.
func (i *Inode) Chunks() int64 {
	bits := blockBits + i.Start&chunkBitsMask
	return (i.Size + 1<<bits - 1) >> bits
}

// ChunkFormat is what the inode of a chunked file has in Start for chunks of so many blocks, a power of two.
func ChunkFormat(blocks int64) uint32 {
	bits := uint32(0)
	for ; blocks > 1; blocks >>= 1 {
		bits++
	}
	return bits & chunkBitsMask
}

// PutChunk writes the first block of chunk i to the map of a chunked file, or a hole for 0: no content is in the image's first
// block.
func PutChunk(chunks []byte, i int, start uint32) {
	if start == 0 {
		start = nullBlock
	}
	binary.LittleEndian.PutUint32(chunks[4*i:], start)
}

// Super is what the superblock says of an image.
type Super struct {
	Inodes, Blocks int64
	Chunks         bool // some file is Chunked
}

// PutSuper writes the superblock to block, the first one of the image, in which all else is already: it is covered by a checksum.
func PutSuper(block []byte, s Super) {
	le := binary.LittleEndian
	b := block[superOffset : superOffset+superSize]
	clear(b)
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], compatChecksum|compatMtime)
	b[12] = blockBits
	le.PutUint16(b[14:], RootOffset/SlotSize)
	le.PutUint64(b[16:], uint64(s.Inodes))
	le.PutUint32(b[36:], uint32(s.Blocks))
	if s.Chunks {
		le.PutUint32(b[80:], incompatChunks)
	}
	le.PutUint32(b[4:], ^crc32.Checksum(block[superOffset:BlockSize], crc32.MakeTable(crc32.Castagnoli)))
}
