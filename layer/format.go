package layer

import "encoding/binary"

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
