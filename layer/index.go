package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The index is zstd's seek table (contrib/seekable_format in its sources): a skippable frame at the end of the blob, which
// decoders of zstd and of LZ4 alike pass over. LZ4 blobs carry the same.
const (
	indexMagic       = 0x184d2a5e // of the skippable frame
	indexFooterMagic = 0x8f92eab1
	indexFooterBytes = 9
	indexEntryBytes  = 8
	indexChecksums   = 0x80 // in the footer's descriptor: each entry has a checksum
	indexReserved    = 0x7c
)

// indexEntry is one frame of an indexed blob. The frames fill the blob from its start to the index.
type indexEntry struct {
	compressed, content uint32
}

// appendIndex appends the index's frame.
func appendIndex(b []byte, entries []indexEntry) []byte {
	b = binary.LittleEndian.AppendUint32(b, indexMagic)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(entries)*indexEntryBytes+indexFooterBytes))
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint32(b, e.compressed)
		b = binary.LittleEndian.AppendUint32(b, e.content)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(entries)))
	return binary.LittleEndian.AppendUint32(append(b, 0), indexFooterMagic)
}

// parseIndex reads the payload of the index's frame.
func parseIndex(payload []byte) ([]indexEntry, error) {
	table := len(payload) - indexFooterBytes
	if table < 0 {
		return nil, errors.New("index is cut off")
	}
	count, descriptor := binary.LittleEndian.Uint32(payload[table:]), payload[table+4]
	if magic := binary.LittleEndian.Uint32(payload[table+5:]); magic != indexFooterMagic {
		return nil, fmt.Errorf("index ends with %#08x", magic)
	}
	if descriptor&indexReserved != 0 {
		return nil, fmt.Errorf("index has the unknown descriptor %#02x", descriptor)
	}
	width := indexEntryBytes
	if descriptor&indexChecksums != 0 {
		width += 4
	}
	if uint64(count)*uint64(width) != uint64(table) {
		return nil, fmt.Errorf("index of %d entries has %d bytes", count, table)
	}
	entries := make([]indexEntry, count)
	for i := range entries {
		e := payload[i*width:]
		entries[i] = indexEntry{binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:])}
	}
	return entries, nil
}

// indexCheck compares a blob's index with the frames that it is about.
type indexCheck struct {
	frames   []indexEntry
	compared bool
}

// frame notes a frame. All frames but the last are full, which also bounds how many there can be.
func (c *indexCheck) frame(compressed, content int) error {
	if c.compared {
		return errors.New("a frame follows the index")
	}
	if n := len(c.frames); content == 0 || content > FrameBytes || n > 0 && c.frames[n-1].content != FrameBytes {
		return fmt.Errorf("frame %d is not one of %d bytes", n, FrameBytes)
	}
	c.frames = append(c.frames, indexEntry{uint32(compressed), uint32(content)})
	return nil
}

// compare reads the index, of size bytes, which describes the frames before it.
func (c *indexCheck) compare(r io.Reader, size int64) error {
	if want := len(c.frames)*indexEntryBytes + indexFooterBytes; c.compared || size != int64(want) {
		return fmt.Errorf("index has %d bytes, and the %d frames before it want %d", size, len(c.frames), want)
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(r, payload); err != nil {
		return err
	}
	entries, err := parseIndex(payload)
	if err != nil {
		return err
	}
	if len(entries) != len(c.frames) {
		return fmt.Errorf("index has %d entries for %d frames", len(entries), len(c.frames))
	}
	for i, e := range entries {
		if e != c.frames[i] {
			return fmt.Errorf("index says that frame %d has %d bytes of %d, and it has %d of %d",
				i, e.compressed, e.content, c.frames[i].compressed, c.frames[i].content)
		}
	}
	c.compared = true
	return nil
}
