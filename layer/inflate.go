package layer

import (
	"encoding/binary"
	"errors"
	"io"
)

var errDeflate = errors.New("invalid deflate data")

const (
	// window is how far back deflate reaches. Each output block has as much room before its data, for a copy of what came before.
	window = 32 << 10
	// slack is room behind the data of an output block: the longest match, and the overshoot of copying eight bytes at a time.
	slack = 512
	// margin of input lets the fast loop load eight bytes twice without looking.
	margin = 16
)

// inflater decodes raw deflate (RFC 1951) from blocks into blocks. It exists because gzip is what nearly all layers are, and its
// decompression what unpacking them waits for: decoding straight from the input block into the output block, with the window in
// the same piece of memory, a 64-bit bit buffer and libdeflate's tables takes half the time of a general reader.
type inflater struct {
	src *blockReader
	in  []byte // of the current input block
	ip  int
	bb  uint64 // bit buffer; bits above bn are zero between calls
	bn  uint

	state  inflateState
	final  bool
	stored int // bytes left of a stored block
	lit    [litSize]uint32
	dist   [distSize]uint32
}

type inflateState int

const (
	atHeader inflateState = iota
	inStored
	inCodes
	atEnd
)

// more adds a byte to the bit buffer.
func (f *inflater) more() error {
	if f.ip == len(f.in) {
		f.src.rest = nil
		if err := f.src.fill(); err == io.EOF {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
		f.in, f.ip = f.src.rest, 0
	}
	f.bb |= uint64(f.in[f.ip]) << f.bn
	f.ip++
	f.bn += 8
	return nil
}

// take gives the next n bits, at most 32.
func (f *inflater) take(n uint) (uint32, error) {
	for f.bn < n {
		if err := f.more(); err != nil {
			return 0, err
		}
	}
	v := uint32(f.bb & (1<<n - 1))
	f.bb >>= n
	f.bn -= n
	return v, nil
}

// align drops the rest of a byte.
func (f *inflater) align() {
	f.bb >>= f.bn & 7
	f.bn &^= 7
}

// decode fills dst from op on, with the window before it from start on, until limit is reached or the stream has ended (state
// atEnd). It gives how far it got, which may be up to slack bytes beyond limit.
func (f *inflater) decode(dst []byte, op, start, limit int) (int, error) {
	for op < limit && f.state != atEnd {
		var err error
		switch f.state {
		case atHeader:
			if f.final {
				f.state = atEnd
				break
			}
			err = f.header()
		case inStored:
			op, err = f.copyStored(dst, op, limit)
		case inCodes:
			if op, err = f.fast(dst, op, start, limit); err == nil && f.state == inCodes && op < limit {
				op, err = f.slow(dst, op, start)
			}
		}
		if err != nil {
			return op, err
		}
	}
	return op, nil
}

// header reads the header of a deflate block and its codes.
func (f *inflater) header() error {
	h, err := f.take(3)
	if err != nil {
		return err
	}
	f.final = h&1 != 0
	switch h >> 1 {
	case 0:
		f.align()
		n, err := f.take(32)
		if err != nil {
			return err
		}
		if uint16(n) != ^uint16(n>>16) {
			return errDeflate
		}
		f.stored, f.state = int(uint16(n)), inStored
		return nil
	case 1:
		var dist [32]uint8
		for i := range dist {
			dist[i] = 5
		}
		buildTable(f.lit[:], litBits, fixedLit[:], litEntries[:])
		buildTable(f.dist[:], distBits, dist[:], distEntries[:])
		f.state = inCodes
		return nil
	case 2:
		return f.codes()
	default:
		return errDeflate
	}
}

// codes reads the codes of a dynamic block.
func (f *inflater) codes() error {
	h, err := f.take(14)
	if err != nil {
		return err
	}
	nlit, ndist, ncode := int(h&31)+257, int(h>>5&31)+1, int(h>>10)+4
	if nlit > 286 || ndist > 30 {
		return errDeflate
	}
	var small [19]uint8
	for _, i := range []byte("\x10\x11\x12\x00\x08\x07\x09\x06\x0a\x05\x0b\x04\x0c\x03\x0d\x02\x0e\x01\x0f")[:ncode] {
		n, err := f.take(3)
		if err != nil {
			return err
		}
		small[i] = uint8(n)
	}
	var table [1 << 7]uint32
	if !buildTable(table[:], 7, small[:], codeEntries[:]) {
		return errDeflate
	}
	var lengths [286 + 30]uint8
	for i := 0; i < nlit+ndist; {
		e, _, err := f.symbol(table[:], 7)
		if err != nil {
			return err
		}
		n := 1
		var l uint8
		switch sym := e >> 16; sym {
		case 16:
			if i == 0 {
				return errDeflate
			}
			n, l, err = f.repeat(3, 2, lengths[i-1])
		case 17:
			n, l, err = f.repeat(3, 3, 0)
		case 18:
			n, l, err = f.repeat(11, 7, 0)
		default:
			l = uint8(sym)
		}
		if err != nil {
			return err
		}
		if i+n > nlit+ndist {
			return errDeflate
		}
		for ; n > 0; n-- {
			lengths[i] = l
			i++
		}
	}
	if !buildTable(f.lit[:], litBits, lengths[:nlit], litEntries[:]) || !buildTable(f.dist[:], distBits, lengths[nlit:nlit+ndist], distEntries[:]) {
		return errDeflate
	}
	f.state = inCodes
	return nil
}

func (f *inflater) repeat(base int, bits uint, l uint8) (int, uint8, error) {
	n, err := f.take(bits)
	return base + int(n), l, err
}

func (f *inflater) copyStored(dst []byte, op, limit int) (int, error) {
	for f.stored > 0 && op < limit {
		if f.bn > 0 || f.ip == len(f.in) {
			b, err := f.take(8)
			if err != nil {
				return op, err
			}
			dst[op] = byte(b)
			op++
			f.stored--
			continue
		}
		n := copy(dst[op:limit], f.in[f.ip:min(len(f.in), f.ip+f.stored)])
		op, f.ip, f.stored = op+n, f.ip+n, f.stored-n
	}
	if f.stored == 0 {
		f.state = atHeader
	}
	return op, nil
}

// symbol reads one symbol with its extra bits, however little input there is.
func (f *inflater) symbol(table []uint32, index uint) (entry, extra uint32, err error) {
	for {
		e, at := table[f.bb&(1<<index-1)], uint(0)
		if e&isPointer != 0 {
			at = index
			e = table[e>>16+uint32(f.bb>>index)&(1<<(e>>8&15)-1)]
		}
		bad := e&isSpecial != 0 && e&isEnd == 0
		if n := at + uint(e&0xff); !bad && n <= f.bn {
			extra = uint32(f.bb & (1<<n - 1) >> (at + uint(e>>8&15)))
			f.bb >>= n
			f.bn -= n
			return e, extra, nil
		}
		if bad && f.bn >= maxCode {
			return 0, 0, errDeflate
		}
		if err := f.more(); err != nil {
			return 0, 0, err
		}
	}
}

// slow decodes one literal or match.
func (f *inflater) slow(dst []byte, op, start int) (int, error) {
	e, extra, err := f.symbol(f.lit[:], litBits)
	switch {
	case err != nil:
		return op, err
	case e&isLiteral != 0:
		dst[op] = byte(e >> 16)
		return op + 1, nil
	case e&isEnd != 0:
		f.state = atHeader
		return op, nil
	}
	length := int(e>>16 + extra)
	e, extra, err = f.symbol(f.dist[:], distBits)
	if err != nil {
		return op, err
	}
	distance := int(e>>16 + extra)
	if distance > op-start {
		return op, errDeflate
	}
	for range length {
		dst[op] = dst[op-distance]
		op++
	}
	return op, nil
}

// fast decodes while there is plenty of input and room.
func (f *inflater) fast(dst []byte, op, start, limit int) (_ int, err error) {
	in, ip, bb, bn := f.in, f.ip, f.bb, uint64(f.bn)
	lit, dist := &f.lit, &f.dist
	for ip <= len(in)-margin && op < limit {
		// Bits above bn are those of the next bytes, or zero: oring them again does no harm.
		bb |= binary.LittleEndian.Uint64(in[ip:]) << (bn & 63)
		ip += int((63 - bn) >> 3)
		bn |= 56
		e := lit[bb&(1<<litBits-1)]
		if e&isLiteral != 0 { // up to three of 11 bits at most
			dst[op] = byte(e >> 16)
			op++
			bb >>= e & 63
			bn -= uint64(e & 0xff)
			e = lit[bb&(1<<litBits-1)]
			if e&isLiteral != 0 {
				dst[op] = byte(e >> 16)
				op++
				bb >>= e & 63
				bn -= uint64(e & 0xff)
				e = lit[bb&(1<<litBits-1)]
				if e&isLiteral != 0 {
					dst[op] = byte(e >> 16)
					op++
					bb >>= e & 63
					bn -= uint64(e & 0xff)
					continue
				}
			}
		}
		if e&isSpecial != 0 {
			if e&isPointer != 0 {
				bb >>= litBits
				bn -= litBits
				e = lit[e>>16+uint32(bb)&(1<<(e>>8&15)-1)]
			}
			if e&isLiteral != 0 {
				dst[op] = byte(e >> 16)
				op++
				bb >>= e & 63
				bn -= uint64(e & 0xff)
				continue
			}
			if e&isEnd != 0 {
				bb >>= e & 63
				bn -= uint64(e & 0xff)
				f.state = atHeader
				break
			}
			if e&isSpecial != 0 {
				err = errDeflate
				break
			}
		}
		length := int(e>>16) + int(bb&(1<<(e&63)-1)>>(e>>8&15))
		bb >>= e & 63
		bn -= uint64(e & 0xff)
		if bn < 32 { // a distance takes up to 28
			bb |= binary.LittleEndian.Uint64(in[ip:]) << (bn & 63)
			ip += int((63 - bn) >> 3)
			bn |= 56
		}
		e = dist[bb&(1<<distBits-1)]
		if e&isSpecial != 0 {
			if e&isPointer != 0 {
				bb >>= distBits
				bn -= distBits
				e = dist[e>>16+uint32(bb)&(1<<(e>>8&15)-1)]
			}
			if e&isSpecial != 0 {
				err = errDeflate
				break
			}
		}
		distance := int(e>>16) + int(bb&(1<<(e&63)-1)>>(e>>8&15))
		bb >>= e & 63
		bn -= uint64(e & 0xff)
		if distance > op-start {
			err = errDeflate
			break
		}
		op = repeatMatch(dst, op, distance, length)
	}
	f.ip, f.bb, f.bn = ip, bb&(1<<bn-1), uint(bn)
	return op, err
}

// repeatMatch appends length bytes from distance back, which may overlap. It may write up to seven bytes more.
func repeatMatch(dst []byte, op, distance, length int) int {
	end, from := op+length, op-distance
	switch {
	case distance >= 8 && length <= 64:
		for ; op < end; op, from = op+8, from+8 {
			binary.LittleEndian.PutUint64(dst[op:], binary.LittleEndian.Uint64(dst[from:]))
		}
	case distance >= length:
		copy(dst[op:end], dst[from:])
	case distance == 1:
		v := uint64(dst[from]) * 0x0101010101010101
		for ; op < end; op += 8 {
			binary.LittleEndian.PutUint64(dst[op:], v)
		}
	default:
		for op < end { // doubles what is repeated with each round
			op += copy(dst[op:end], dst[from:op])
		}
	}
	return end
}
