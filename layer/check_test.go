package layer_test

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"testing"
)

// checker reads an image by the kernel's documentation alone, and finds what the kernel would not accept: it shares no code with
// the writer.
type checker struct {
	img    []byte
	owner  map[int64]string // slot of 32 bytes -> whose it is
	inodes map[uint64]*checkedInode
	errs   []error
}

type checkedInode struct {
	links, found uint32
	dir          bool
}

// checkImage fails the test if an image is not well-formed.
func checkImage(t testing.TB, file string) {
	t.Helper()
	img, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	c := &checker{img: img, owner: map[int64]string{}, inodes: map[uint64]*checkedInode{}}
	c.super()
	for _, err := range c.errs {
		t.Errorf("image: %v", err)
	}
}

func (c *checker) fail(format string, args ...any) {
	if len(c.errs) < 10 {
		c.errs = append(c.errs, fmt.Errorf(format, args...))
	}
}

func (c *checker) u16(at int64) uint16 { return binary.LittleEndian.Uint16(c.img[at:]) }
func (c *checker) u32(at int64) uint32 { return binary.LittleEndian.Uint32(c.img[at:]) }
func (c *checker) u64(at int64) uint64 { return binary.LittleEndian.Uint64(c.img[at:]) }

// own claims bytes of the image for one user.
func (c *checker) own(at, n int64, who string) bool {
	if at < 0 || n < 0 || at+n > int64(len(c.img)) {
		c.fail("%s: %d bytes at %d are not in the image of %d", who, n, at, len(c.img))
		return false
	}
	for slot := at / 32; slot*32 < at+n; slot++ {
		if other := c.owner[slot]; other != "" && other != who {
			c.fail("%s and %s share byte %d", who, other, slot*32)
			return false
		}
		c.owner[slot] = who
	}
	return true
}

func (c *checker) super() {
	if len(c.img) < 4096 || len(c.img)%4096 != 0 {
		c.fail("size %d", len(c.img))
		return
	}
	if c.u32(1024) != 0xe0f5e1e2 || c.img[1024+12] != 12 || c.u32(1024+80)&^4 != 0 || c.u32(1024+40) != 0 {
		c.fail("superblock %x", c.img[1024:1152])
	}
	first := append([]byte(nil), c.img[1024:4096]...)
	copy(first[4:8], []byte{0, 0, 0, 0})
	if want := ^crc32.Checksum(first, crc32.MakeTable(crc32.Castagnoli)); c.u32(1024+4) != want {
		c.fail("checksum %x, want %x", c.u32(1024+4), want)
	}
	if int64(c.u32(1024+36))*4096 != int64(len(c.img)) {
		c.fail("%d blocks in %d bytes", c.u32(1024+36), len(c.img))
	}
	c.own(1024, 128, "superblock")
	root := uint64(c.u16(1024 + 14))
	c.inode(root, root, "/")
	for nid, ino := range c.inodes {
		if ino.links != ino.found {
			c.fail("inode %d has %d links, found %d", nid, ino.links, ino.found)
		}
	}
	if n := c.u64(1024 + 16); n != uint64(len(c.inodes)) {
		c.fail("%d inodes, found %d", n, len(c.inodes))
	}
}

// inode checks one by its number and gives its type.
func (c *checker) inode(nid, parent uint64, path string) (kind uint16) {
	at := int64(nid * 32)
	if at+64 > int64(len(c.img)) || at < 1152 {
		c.fail("%s: inode %d is not in the image", path, nid)
		return 0
	}
	mode := c.u16(at + 4)
	kind = mode >> 12
	if ino := c.inodes[nid]; ino != nil {
		if ino.dir {
			c.fail("%s: directory has two names", path)
		}
		ino.found++
		return kind
	}
	ino := &checkedInode{links: c.u32(at + 44), found: 1, dir: kind == 4}
	c.inodes[nid] = ino
	format, size := c.u16(at), int64(c.u64(at+8))
	layout := format >> 1
	if format&1 != 1 || layout != 0 && layout != 2 && layout != 4 || size < 0 || c.u32(at+40) >= 1e9 {
		c.fail("%s: inode %x", path, c.img[at:at+64])
		return kind
	}
	end := at + 64 + c.xattrs(at, path)
	content := c.content(at, end, size, layout, path)
	switch kind {
	case 4:
		ino.found++
		c.dir(nid, parent, content, path, ino)
	case 10:
		if size == 0 || size > 4095 || layout == 2 && end%4096+size > 4096 {
			c.fail("%s: link of %d bytes", path, size)
		}
	case 8:
	case 2, 6, 1, 12:
		if size != 0 {
			c.fail("%s: device of %d bytes", path, size)
		}
	default:
		c.fail("%s: mode %o", path, mode)
	}
	return kind
}

// xattrs checks what follows an inode, and gives its size.
func (c *checker) xattrs(at int64, path string) int64 {
	units := int64(c.u16(at + 2))
	who := fmt.Sprintf("inode of %s", path)
	if units == 0 {
		c.own(at, 64, who)
		return 0
	}
	n := 12 + 4*(units-1)
	if !c.own(at, 64+n, who) {
		return 0
	}
	if c.img[at+64+4] != 0 {
		c.fail("%s: shared attributes", path)
	}
	for p, end := at+64+12, at+64+n; p < end; {
		index := c.img[p+1]
		if index == 0 || index > 6 || index == 5 {
			c.fail("%s: attribute of namespace %d", path, index)
		}
		p += (4 + int64(c.img[p]) + int64(c.u16(p+2)) + 3) &^ 3
		if p > end {
			c.fail("%s: attributes overflow", path)
		}
	}
	return n
}

// content gives an inode's content, of directories only, and claims its place.
func (c *checker) content(at, end, size int64, layout uint16, path string) (out []byte) {
	who := fmt.Sprintf("inode of %s", path)
	start := int64(c.u32(at+16)) * 4096
	kind := c.u16(at+4) >> 12
	if kind != 4 && kind != 8 && kind != 10 {
		return nil
	}
	switch layout {
	case 4:
		bits := 12 + c.u32(at+16)&31
		n := (size + 1<<bits - 1) >> bits
		if !c.own(end, 4*n, who) {
			return nil
		}
		for i := range n {
			if b := c.u32(end + 4*i); b != 1<<32-1 {
				c.own(int64(b)*4096, min(int64(1)<<bits, (size-i<<bits+4095)&^4095), who+" content")
			}
		}
		return nil
	case 2:
		tail := size % 4096
		if end%4096+tail > 4096 {
			c.fail("%s: the end of its content crosses a block", path)
		}
		c.own(end, tail, who)
		if size -= tail; size > 0 {
			c.own(start, size, who+" content")
		}
		if kind == 4 && start+size <= int64(len(c.img)) && end+tail <= int64(len(c.img)) {
			return append(append(out, c.img[start:start+size]...), c.img[end:end+tail]...)
		}
		return nil
	}
	if size > 0 && c.own(start, (size+4095)&^4095, who+" content") && kind == 4 {
		return c.img[start : start+size]
	}
	return nil
}

// dir checks a directory's entries, and what they lead to.
func (c *checker) dir(nid, parent uint64, content []byte, path string, ino *checkedInode) {
	last := ""
	dots := 0
	for len(content) > 0 {
		block := content[:min(4096, len(content))]
		content = content[len(block):]
		n := 0
		if len(block) >= 12 {
			n = int(binary.LittleEndian.Uint16(block[8:])) / 12
		}
		if n == 0 || 12*n > len(block) {
			c.fail("%s: block of %d entries", path, n)
			return
		}
		for i := range n {
			from, to := int(binary.LittleEndian.Uint16(block[12*i+8:])), len(block)
			if i+1 < n {
				to = int(binary.LittleEndian.Uint16(block[12*i+20:]))
			}
			if from < 12*n || to < from || to > len(block) {
				c.fail("%s: name at %d to %d", path, from, to)
				return
			}
			name := block[from:to]
			for i, b := range name {
				if b == 0 { // only what pads the last one
					name = name[:i]
					break
				}
			}
			if len(name) == 0 || len(name) > 255 || string(name) <= last {
				c.fail("%s: name %q after %q", path, name, last)
			}
			last = string(name)
			to64 := binary.LittleEndian.Uint64(block[12*i:])
			switch last {
			case ".":
				dots++
				if to64 != nid {
					c.fail("%s: . is %d", path, to64)
				}
			case "..":
				dots++
				if to64 != parent {
					c.fail("%s: .. is %d, not %d", path, to64, parent)
				}
			default:
				kind := c.inode(to64, nid, path+last+"/")
				if kind == 4 {
					ino.found++
				}
				if want := map[uint16]byte{8: 1, 4: 2, 2: 3, 6: 4, 1: 5, 12: 6, 10: 7}[kind]; block[12*i+10] != want {
					c.fail("%s%s: type %d, want %d", path, last, block[12*i+10], want)
				}
			}
		}
	}
	if dots != 2 {
		c.fail("%s: %d of . and ..", path, dots)
	}
}
