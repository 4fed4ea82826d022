package layer

import (
	"bufio"
	"encoding/binary"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// format is how a blob is compressed.
type format int

// The formats that Unpack reads. A layer's media type is not asked: registries hold layers whose media type is wrong, and the
// bytes never are.
const (
	formatTar format = iota
	formatGzip
	formatZstd
	formatLZ4
)

func (f format) String() string {
	return [...]string{"tar", "gzip", "zstd", "lz4"}[f]
}

// maxWindow bounds what a zstd frame can make us allocate; it is what zstd's own decoder accepts without being told otherwise.
const maxWindow = 128 << 20

// sniff tells the format from the first bytes of a blob. What has no known magic is taken for a tar, which then has to prove it.
func sniff(head []byte) format {
	for len(head) >= 4 {
		magic := binary.LittleEndian.Uint32(head)
		switch {
		case magic&0xffffff == 0x088b1f:
			return formatGzip
		case magic == 0xfd2fb528:
			return formatZstd
		case magic == 0x184d2204, magic == 0x184c2102:
			return formatLZ4
		case magic&^0xf == 0x184d2a50:
			// A skippable frame, which zstd and LZ4 have in common: the next one tells.
			if len(head) < 8 {
				return formatZstd
			}
			skip := 8 + uint64(binary.LittleEndian.Uint32(head[4:]))
			if skip+4 > uint64(len(head)) {
				return formatZstd
			}
			head = head[skip:]
			continue
		}
		break
	}
	return formatTar
}

// streamDecoder decodes what cannot be cut into units.
type streamDecoder struct {
	r    io.Reader
	end  func()
	done bool
}

func newStreamDecoder(f format, src io.Reader) (*streamDecoder, error) {
	if f == formatLZ4 {
		d := lz4.NewReader(bufio.NewReaderSize(src, 64<<10))
		if err := d.Apply(lz4.ConcurrencyOption(1)); err != nil {
			return nil, err
		}
		return &streamDecoder{r: d, end: func() { d.Reset(nil) }}, nil
	}
	// One goroutine: within one frame more of them gain nothing.
	d, err := zstd.NewReader(src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	return &streamDecoder{r: d, end: d.Close}, nil
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

func (d *streamDecoder) close() { d.end() }
