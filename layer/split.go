package layer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	// unitBytes is how many compressed bytes a unit may have: a block that did not compress, and the headers.
	unitBytes = blockSize + 4096
	// unitPieces bounds what is kept of a unit beside its bytes, against blobs of empty LZ4 blocks.
	unitPieces = 4096

	maxZstdBlock = 128 << 10 // RFC 8878, 3.1.1.2.4
	zstdMagic    = 0xfd2fb528
	lz4Magic     = 0x184d2204
	lz4Stored    = 1 << 31 // the block is not compressed
)

// errLarge says that a frame does not fit a unit: it is decoded as a stream.
var errLarge = errors.New("frame is larger than a block")

// run is a piece of a stream, uncopied: each part holds a reference to its block.
type run struct {
	parts []part
	size  int
}

type part struct {
	block    *block
	from, to int // in block.data
}

func (r *run) add(b *block, from, to int) {
	r.size += to - from
	if n := len(r.parts); n > 0 && r.parts[n-1].block == b && r.parts[n-1].to == from {
		r.parts[n-1].to = to
		return
	}
	b.retain(1)
	r.parts = append(r.parts, part{b, from, to})
}

// take moves the parts of another run behind this one's.
func (r *run) take(o *run) {
	for _, p := range o.parts {
		r.add(p.block, p.from, p.to)
	}
	o.release()
}

func (r *run) release() {
	for _, p := range r.parts {
		p.block.release()
	}
	r.parts, r.size = nil, 0
}

// bytes gives the run in one piece, in scratch if it lies in several blocks.
func (r *run) bytes(scratch []byte) []byte {
	if len(r.parts) == 1 {
		p := r.parts[0]
		return p.block.data[p.from:p.to]
	}
	scratch = scratch[:0]
	for _, p := range r.parts {
		scratch = append(scratch, p.block.data[p.from:p.to]...)
	}
	return scratch
}

// unit is one or more whole frames that unpack to one block or less, and can be decoded without what comes before.
type unit struct {
	run
	bound  int        // it unpacks to no more than this
	pieces []lz4Block // of LZ4; zstd's decoder finds its own way
}

// lz4Block is where a block lies in its run.
type lz4Block struct {
	from, to int
	stored   bool
}

// splitter cuts a stream of zstd or LZ4 frames into units, by walking the headers of frames and blocks, as the stream comes in.
// It is used by one goroutine.
type splitter struct {
	in      *blockReader
	format  format
	frame   unit // being walked
	unit    unit // whole frames before it
	index   *indexCheck
	flushed bool // the stream is at its end, and the last unit was given out
}

// next gives the next unit, whose parts the caller releases. io.EOF is the end. After errLarge, large gives the frame that is too
// large.
func (s *splitter) next() (*unit, error) {
	for !s.flushed {
		err := s.walk()
		switch {
		case err == io.EOF:
			s.flushed = true
			if s.index != nil && !s.index.compared {
				return nil, errors.New("it has no index")
			}
		case err == errLarge && s.unit.size > 0: // what is before it comes first, and the frame again
			return s.flush(), nil
		case err != nil:
			return nil, err
		case s.unit.size+s.frame.size > unitBytes || s.unit.bound+s.frame.bound > blockSize || len(s.unit.pieces)+len(s.frame.pieces) > unitPieces:
			u := s.flush()
			s.keep()
			return u, nil
		default:
			s.keep()
		}
	}
	if s.unit.size > 0 {
		return s.flush(), nil
	}
	return nil, io.EOF
}

func (s *splitter) flush() *unit {
	u := s.unit
	s.unit = unit{}
	return &u
}

// keep adds the frame to the unit.
func (s *splitter) keep() {
	for _, p := range s.frame.pieces {
		s.unit.pieces = append(s.unit.pieces, lz4Block{p.from + s.unit.size, p.to + s.unit.size, p.stored})
	}
	s.unit.bound += s.frame.bound
	s.unit.take(&s.frame.run)
	s.frame = unit{}
}

// large gives the frame that was being walked. next goes on behind it, when it has been read to its end.
func (s *splitter) large() (*largeFrame, error) {
	begin := make([]byte, 0, s.frame.size)
	for _, p := range s.frame.parts {
		begin = append(begin, p.block.data[p.from:p.to]...)
	}
	s.frame.release()
	s.frame = unit{}
	return newLargeFrame(s.format, begin, io.MultiReader(bytes.NewReader(begin), s.in))
}

// walk reads one frame into s.frame. It skips frames that are to be skipped.
func (s *splitter) walk() error {
	if s.frame.size > 0 {
		return errLarge // it was found before
	}
	for {
		magic, err := s.magic()
		if err != nil {
			return err
		}
		switch {
		case magic&^0xf == 0x184d2a50:
			if err := s.skip(magic); err != nil {
				return err
			}
		case magic == zstdMagic && s.format == formatZstd:
			return s.framed(s.walkZstd())
		case magic == lz4Magic && s.format == formatLZ4:
			return s.framed(s.walkLZ4())
		default:
			if s.format == formatLZ4 { // LZ4's legacy frames have no end of their own
				return s.framed(errLarge)
			}
			return fmt.Errorf("no %s frame begins with %#08x", s.format, magic)
		}
	}
}

// framed notes a frame for the index, or that it cannot be in one.
func (s *splitter) framed(err error) error {
	if s.index == nil || err != nil && err != errLarge {
		return err
	}
	if err == errLarge {
		return fmt.Errorf("frame %d is larger than %d bytes", len(s.index.frames), FrameBytes)
	}
	return s.index.frame(s.frame.size, s.frame.bound)
}

// magic reads a frame's first four bytes. The stream may end before them.
func (s *splitter) magic() (uint32, error) {
	if err := s.in.fill(); err != nil {
		return 0, err
	}
	var b [4]byte
	err := s.grab(b[:], len(b))
	return binary.LittleEndian.Uint32(b[:]), err
}

// grab adds n bytes of the stream to the frame. It copies them to head too, as far as that goes.
func (s *splitter) grab(head []byte, n int) error {
	for n > 0 {
		if err := s.in.fill(); err == io.EOF {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
		m := min(n, len(s.in.rest))
		from := len(s.in.cur.data) - len(s.in.rest)
		s.frame.add(s.in.cur, from, from+m)
		head = head[copy(head, s.in.rest[:m]):]
		s.in.rest = s.in.rest[m:]
		n -= m
	}
	return nil
}

// skip passes over a skippable frame, and reads it if it is the index.
func (s *splitter) skip(magic uint32) error {
	var b [4]byte
	if err := s.grab(b[:], len(b)); err != nil {
		return err
	}
	s.frame.release()
	size := int64(binary.LittleEndian.Uint32(b[:]))
	payload := io.LimitReader(s.in, size)
	if magic == indexMagic && s.index != nil {
		return s.index.compare(payload, size)
	}
	if n, err := io.Copy(io.Discard, payload); err != nil {
		return err
	} else if n < size {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// walkZstd reads a frame of RFC 8878 behind its magic number.
func (s *splitter) walkZstd() error {
	var h [14]byte
	if err := s.grab(h[:1], 1); err != nil {
		return err
	}
	flags := h[0]
	single := flags&0x20 != 0
	sizeLen := [...]int{0, 2, 4, 8}[flags>>6]
	if single && sizeLen == 0 {
		sizeLen = 1
	}
	skip := [...]int{0, 1, 2, 4}[flags&3] // dictionary
	if !single {
		skip++ // window
	}
	if err := s.grab(h[:skip+sizeLen], skip+sizeLen); err != nil {
		return err
	}
	content, known := contentSize(h[skip:skip+sizeLen]), sizeLen > 0
	if known && content > blockSize {
		return errLarge
	}
	blocks, err := s.walkZstdBlocks(known)
	if err != nil {
		return err
	}
	s.frame.bound = int(content)
	if !known {
		s.frame.bound = blocks * maxZstdBlock
	}
	if flags&4 != 0 {
		return s.grab(nil, 4)
	}
	return nil
}

// contentSize reads a zstd frame's content size, of whatever length.
func contentSize(b []byte) uint64 {
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(b)) + 256
	case 4:
		return uint64(binary.LittleEndian.Uint32(b))
	case 8:
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (s *splitter) walkZstdBlocks(sizeKnown bool) (blocks int, err error) {
	for last := false; !last; {
		var h [3]byte
		if err := s.grab(h[:], len(h)); err != nil {
			return 0, err
		}
		var size int
		var err error
		if last, size, err = zstdBlock(h[:]); err != nil {
			return 0, err
		}
		blocks++
		if !sizeKnown && blocks > blockSize/maxZstdBlock || s.frame.size+size > unitBytes {
			return 0, errLarge
		}
		if err := s.grab(nil, size); err != nil {
			return 0, err
		}
	}
	return blocks, nil
}

// zstdBlock reads a block's header: whether it is a frame's last, and how many bytes are behind it.
func zstdBlock(h []byte) (last bool, size int, err error) {
	head := uint32(h[0]) | uint32(h[1])<<8 | uint32(h[2])<<16
	size = int(head >> 3)
	if size > maxZstdBlock || head>>1&3 == 3 {
		return false, 0, fmt.Errorf("block header %#06x is not zstd's", head)
	}
	if head>>1&3 == 1 {
		size = 1 // repeated
	}
	return head&1 != 0, size, nil
}

// walkLZ4 reads a frame behind its magic number. Only a frame that says its size, and whose blocks are independent, is a unit.
func (s *splitter) walkLZ4() error {
	var h [8]byte
	if err := s.grab(h[:], 2); err != nil {
		return err
	}
	flags, code := h[0], h[1]>>4&7
	if flags>>6 != 1 || code < 4 {
		return fmt.Errorf("frame descriptor %#02x %#02x is not LZ4's", h[0], h[1])
	}
	if flags&0x29 != 0x28 { // independent blocks, a size, no dictionary
		return errLarge
	}
	if err := s.grab(h[:], 8); err != nil {
		return err
	}
	content := binary.LittleEndian.Uint64(h[:])
	if content > blockSize {
		return errLarge
	}
	s.frame.bound = int(content)
	tail := 0
	if flags&0x10 != 0 {
		tail = 4 // a checksum behind each block
	}
	if err := s.grab(nil, 1); err != nil { // the header's checksum; the blob's digest holds it too
		return err
	}
	if err := s.walkLZ4Blocks(64<<10<<(2*(code-4)), tail); err != nil {
		return err
	}
	if flags&4 != 0 {
		return s.grab(nil, 4)
	}
	return nil
}

func (s *splitter) walkLZ4Blocks(most, tail int) error {
	for {
		var h [4]byte
		if err := s.grab(h[:], len(h)); err != nil {
			return err
		}
		head := binary.LittleEndian.Uint32(h[:])
		if head == 0 {
			return nil
		}
		size := int(head &^ lz4Stored)
		if size > most {
			return fmt.Errorf("block of %d bytes in a frame of blocks of %d", size, most)
		}
		if s.frame.size+size+tail > unitBytes || len(s.frame.pieces) == unitPieces {
			return errLarge
		}
		s.frame.pieces = append(s.frame.pieces, lz4Block{s.frame.size, s.frame.size + size, head&lz4Stored != 0})
		if err := s.grab(nil, size+tail); err != nil {
			return err
		}
	}
}
