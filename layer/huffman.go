package layer

import "math/bits"

// A table of a Huffman code gives for the next bits of the stream an entry:
//
//	bits 0–7    how many bits to drop: of the code, and of the extra bits behind it
//	bits 8–11   how many of them are the code; for a pointer, how many bits index the second table
//	bits 12–15  flags
//	bits 16–31  the literal, the base of a length or distance, or where the second table starts
//
// The layout follows libdeflate's, so that one look-up yields all that a symbol needs.
const (
	isLiteral = 1 << 15
	isSpecial = 1 << 14 // a pointer, the end, or, with neither flag, no code at all
	isPointer = 1 << 13
	isEnd     = 1 << 12

	litBits  = 11
	distBits = 8
	// A complete code of 288 symbols of up to 15 bits needs 2342 entries behind 11 index bits, one of 32 needs 402 behind 8.
	litSize  = 2400
	distSize = 416
	maxCode  = 15
)

// The entries of all symbols, without their code.
var (
	litEntries  = makeLitEntries()
	distEntries = makeDistEntries()
	codeEntries = makeCodeEntries()
	fixedLit    = makeFixedLengths()
)

func makeLitEntries() (e [288]uint32) {
	for i := range uint32(256) {
		e[i] = i<<16 | isLiteral
	}
	e[256] = isSpecial | isEnd
	base := uint32(3)
	for i := range uint32(28) {
		extra := uint32(0)
		if i >= 8 {
			extra = i/4 - 1
		}
		e[257+i] = base<<16 | extra
		base += 1 << extra
	}
	e[285] = 258 << 16
	e[286], e[287] = isSpecial, isSpecial
	return e
}

func makeDistEntries() (e [32]uint32) {
	base := uint32(1)
	for i := range uint32(30) {
		extra := uint32(0)
		if i >= 4 {
			extra = i/2 - 1
		}
		e[i] = base<<16 | extra
		base += 1 << extra
	}
	e[30], e[31] = isSpecial, isSpecial
	return e
}

func makeCodeEntries() (e [19]uint32) {
	for i := range uint32(19) {
		e[i] = i << 16
	}
	return e
}

func makeFixedLengths() (l [288]uint8) {
	for i := range l {
		switch {
		case i < 144:
			l[i] = 8
		case i < 256:
			l[i] = 9
		case i < 280:
			l[i] = 7
		default:
			l[i] = 8
		}
	}
	return l
}

// buildTable makes the table of the canonical code with these lengths, and says whether it is one. As in the standard library a
// code may be empty, or consist of a single code of one bit; otherwise it must be complete.
func buildTable(table []uint32, index uint, lengths []uint8, entries []uint32) bool {
	var count, offset [maxCode + 1]int
	for _, l := range lengths {
		count[l]++
	}
	used, longest, space := 0, 0, 0
	for l := 1; l <= maxCode; l++ {
		offset[l] = used
		used += count[l]
		space = space<<1 + count[l]
		if space > 1<<l {
			return false
		}
		if count[l] > 0 {
			longest = l
		}
	}
	if full := space == 1<<maxCode; !full {
		if used > 1 || used == 1 && longest != 1 {
			return false
		}
		for i := range 1 << index {
			table[i] = isSpecial
		}
	}
	var sorted [288]uint16
	for sym, l := range lengths {
		if l > 0 {
			sorted[offset[l]] = uint16(sym)
			offset[l]++
		}
	}
	fillTable(table, index, sorted[:used], lengths, entries, &count, longest)
	return true
}

func fillTable(table []uint32, index uint, sorted []uint16, lengths []uint8, entries []uint32, count *[maxCode + 1]int, longest int) {
	code, last := 0, 0
	prefix, start, width := -1, 1<<index, 0 // of the second table being filled
	for _, sym := range sorted {
		l := int(lengths[sym])
		code <<= l - last
		last = l
		reversed := int(bits.Reverse16(uint16(code)) >> (16 - l))
		code++
		if l <= int(index) {
			e := entries[sym] + uint32(l) | uint32(l)<<8
			for i := reversed; i < 1<<index; i += 1 << l {
				table[i] = e
			}
			count[l]--
			continue
		}
		if p := reversed & (1<<index - 1); p != prefix {
			start += 1 << width * min(1, width)
			prefix, width = p, l-int(index)
			// As wide as the codes with this prefix are long.
			for room := 1<<width - count[l]; room > 0 && width+int(index) < longest; {
				width++
				room = room<<1 - count[width+int(index)]
			}
			table[p] = uint32(start)<<16 | isSpecial | isPointer | uint32(width)<<8 | uint32(index)
		}
		rest := l - int(index)
		e := entries[sym] + uint32(rest) | uint32(rest)<<8
		for i := reversed >> index; i < 1<<width; i += 1 << rest {
			table[start+i] = e
		}
		count[l]--
	}
}
