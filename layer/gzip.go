package layer

import (
	"errors"
	"hash/crc32"
	"io"
)

var (
	errGzipHeader = errors.New("invalid gzip header")
	errGzipSum    = errors.New("gzip checksum or length does not hold")
)

// gzipDecoder decodes all members of a gzip blob (RFC 1952). What follows the last member and is no member is ignored, as gzip
// and pigz do; the blob's digest covers it all the same.
type gzipDecoder struct {
	f       inflater
	between bool // members
	before  [window]byte
	member  int64 // bytes that the current member gave so far
	sum     uint32
}

func newGzipDecoder(src *blockReader) (*gzipDecoder, error) {
	g := &gzipDecoder{}
	g.f.src, g.f.in = src, src.rest
	return g, g.begin()
}

// decode fills a block. The block's data is then its part behind the window; io.EOF comes without data.
func (g *gzipDecoder) decode(b *block) (int, error) {
	if g.between {
		return 0, io.EOF
	}
	const limit = window + blockSize
	dst := b.mem[:limit+slack]
	copy(dst, g.before[:])
	op := window
	for op < limit && !g.between {
		start := op - int(min(g.member, window))
		from := op
		var err error
		op, err = g.f.decode(dst, op, start, limit)
		g.sum = crc32.Update(g.sum, crc32.IEEETable, dst[from:op])
		g.member += int64(op - from)
		if err != nil {
			return op - window, err
		}
		if g.f.state == atEnd {
			if err := g.end(); err != nil {
				return op - window, err
			}
		}
	}
	copy(g.before[:], dst[op-window:op])
	return op - window, nil
}

// begin reads a member's header.
func (g *gzipDecoder) begin() error {
	h, err := g.bytes(10)
	if err != nil {
		return err
	}
	flags := h[3]
	if h[0] != 0x1f || h[1] != 0x8b || h[2] != 8 || flags>>5 != 0 {
		return errGzipHeader
	}
	if flags&4 != 0 {
		n, err := g.bytes(2)
		if err != nil {
			return err
		}
		if _, err := g.bytes(int(n[0]) | int(n[1])<<8); err != nil {
			return err
		}
	}
	for _, text := range []byte{8, 16} { // name, comment
		for flags&text != 0 {
			c, err := g.f.take(8)
			if err != nil {
				return err
			}
			if c == 0 {
				break
			}
		}
	}
	if flags&2 != 0 {
		if _, err := g.bytes(2); err != nil {
			return err
		}
	}
	g.f.state, g.f.final, g.member, g.sum = atHeader, false, 0, 0
	return nil
}

// end checks a member's trailer, and begins the next member if there is one.
func (g *gzipDecoder) end() error {
	g.f.align()
	sum, err := g.f.take(32)
	if err != nil {
		return err
	}
	size, err := g.f.take(32)
	if err != nil {
		return err
	}
	if sum != g.sum || size != uint32(g.member) {
		return errGzipSum
	}
	for g.f.bn < 24 {
		if err := g.f.more(); err == io.ErrUnexpectedEOF {
			g.between = true
			return nil
		} else if err != nil {
			return err
		}
	}
	if g.f.bb&0xffffff != 0x088b1f {
		g.between = true
		return nil
	}
	return g.begin()
}

func (g *gzipDecoder) bytes(n int) ([]byte, error) {
	b := make([]byte, n)
	for i := range b {
		c, err := g.f.take(8)
		if err != nil {
			return nil, err
		}
		b[i] = byte(c)
	}
	return b, nil
}
