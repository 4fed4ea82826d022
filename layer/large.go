package layer

import (
	"encoding/binary"
	"io"
	"math"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// largeFrame reads one frame that is no unit, from its beginning to its end, which it finds by the headers of its blocks. So no
// decoder sees a frame whose memory was not taken for it before.
type largeFrame struct {
	src    io.Reader
	format format
	memory uint64 // that its decoder takes
	window uint64 // of it, for zstd

	header [4]byte
	head   []byte // what is left of a block's header
	body   int64  // what is left behind that
	last   bool   // nothing comes after it

	endless bool  // LZ4's legacy frames end with the stream
	tail    int64 // checksum behind each block
	sum     int64 // checksum behind all
}

// newLargeFrame reads from src a frame whose first bytes are begin. They are its descriptor at least, of LZ4 two bytes of it.
func newLargeFrame(f format, begin []byte, src io.Reader) (*largeFrame, error) {
	l := &largeFrame{src: src, format: f}
	if f == formatLZ4 {
		l.describeLZ4(begin)
		return l, nil
	}
	var h zstd.Header
	if err := h.Decode(begin); err != nil {
		return nil, err
	}
	l.body, l.window = int64(h.HeaderSize), h.WindowSize
	if h.SingleSegment {
		l.window = h.FrameContentSize
	}
	l.memory = min(l.window, math.MaxUint64-decoderBytes) + decoderBytes
	if h.HasCheckSum {
		l.sum = 4
	}
	return l, nil
}

// describeLZ4 reads magic and descriptor. Of a block there are at the same time its bytes and what they unpack to.
func (l *largeFrame) describeLZ4(begin []byte) {
	if binary.LittleEndian.Uint32(begin) != lz4Magic {
		l.endless, l.body, l.memory = true, math.MaxInt64, 2*(8<<20)+decoderBytes
		return
	}
	flags, code := begin[4], begin[5]>>4&7
	l.memory = 2*(64<<10<<(2*(code-4))) + decoderBytes
	l.body = 4 + 2 + 1
	if flags&8 != 0 {
		l.body += 8 // size
	}
	if flags&1 != 0 {
		l.body += 4 // dictionary
	}
	if flags&0x10 != 0 {
		l.tail = 4
	}
	if flags&4 != 0 {
		l.sum = 4
	}
}

// Read implements io.Reader. At the end of the frame it gives io.EOF.
func (l *largeFrame) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(l.head) == 0 && l.body == 0 {
		if l.last {
			return 0, io.EOF
		}
		if err := l.next(); err != nil {
			return 0, err
		}
	}
	if len(l.head) > 0 {
		n := copy(p, l.head)
		l.head = l.head[n:]
		return n, nil
	}
	n, err := l.src.Read(p[:min(int64(len(p)), l.body)])
	l.body -= int64(n)
	if err == io.EOF && l.endless {
		l.last, l.body = true, 0
	} else if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// next reads the header of a block.
func (l *largeFrame) next() error {
	l.head = l.header[:4]
	if l.format == formatZstd {
		l.head = l.header[:3]
	}
	if _, err := io.ReadFull(l.src, l.head); err == io.EOF {
		return io.ErrUnexpectedEOF
	} else if err != nil {
		return err
	}
	if l.format == formatLZ4 {
		head := binary.LittleEndian.Uint32(l.head)
		l.last, l.body = head == 0, l.sum
		if !l.last {
			l.body = int64(head&^lz4Stored) + l.tail
		}
		return nil
	}
	last, size, err := zstdBlock(l.head)
	if err != nil {
		return err
	}
	l.last, l.body = last, int64(size)
	if last {
		l.body += l.sum
	}
	return nil
}

// streamDecoder decodes a large frame.
type streamDecoder struct {
	r    io.Reader
	end  func() // lets go of the source, and of what is not the loan's
	done bool
}

// open makes what decodes the frame, in the memory of a loan.
func (l *largeFrame) open(from *loan) (*streamDecoder, error) {
	if l.format == formatLZ4 {
		d := lz4.NewReader(l)
		return &streamDecoder{r: d, end: func() { d.Reset(nil) }}, d.Apply(lz4.ConcurrencyOption(1))
	}
	if from.zstd == nil {
		// One goroutine: within one frame more of them gain nothing. Checksums are not looked at, as those of units.
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(false),
			zstd.WithDecoderMaxWindow(uint64(from.blocks)*blockMemory-decoderBytes), zstd.IgnoreChecksum(true))
		if err != nil {
			return nil, err
		}
		from.zstd = d
	}
	return &streamDecoder{r: from.zstd, end: func() { _ = from.zstd.Reset(nil) }}, from.zstd.Reset(l)
}

// decode fills the block's memory behind the window, and says how much of it. At the end it gives io.EOF.
func (d *streamDecoder) decode(b *block) (int, error) {
	if d.done {
		return 0, io.EOF
	}
	buf, n := b.mem[window:window+blockSize], 0
	for n < len(buf) {
		m, err := d.r.Read(buf[n:])
		n += m
		if err == io.EOF {
			d.done = true
			return n, nil
		} else if err != nil {
			return n, err
		}
	}
	return n, nil
}
