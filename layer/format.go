package layer

import (
	"bufio"
	"encoding/binary"
	"fmt"
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

// decoder decompresses a blob.
type decoder interface {
	// decode fills the block's memory behind the window, at least blockSize of it unless the end is near, and says how much.
	// At the end it gives io.EOF.
	decode(b *block) (int, error)
	close()
}

func newDecoder(f format, src *blockReader) (decoder, error) {
	switch f {
	case formatGzip:
		return newGzipDecoder(src)
	case formatZstd:
		// One goroutine: within one frame more of them gain nothing.
		d, err := zstd.NewReader(src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return &readerDecoder{r: d, end: d.Close}, nil
	case formatLZ4:
		d := lz4.NewReader(bufio.NewReaderSize(src, 64<<10))
		if err := d.Apply(lz4.ConcurrencyOption(1)); err != nil {
			return nil, err
		}
		return &readerDecoder{r: d, end: func() { d.Reset(nil) }}, nil
	default:
		return nil, fmt.Errorf("no decoder for %s", f)
	}
}

// readerDecoder makes a decoder of another package one of ours.
type readerDecoder struct {
	r    io.Reader
	end  func()
	done bool
}

func (d *readerDecoder) decode(b *block) (int, error) {
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

func (d *readerDecoder) close() { d.end() }
