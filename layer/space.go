package layer

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer/erofs"
)

const (
	// outBytes is how much content of small files is gathered before it is written, and the extent that inodes share.
	outBytes = 256 << 10
	// outBuffers is how many such pieces an image has: one being filled with content and one with inodes, two being written.
	outBuffers = 4
	// directBytes is the content from which on gathering costs more than a system call.
	directBytes = 64 << 10
	// behindBytes is how much is written before the disk is told to begin: enough for large extents, little enough that the
	// sync at the end is short.
	behindBytes = 16 << 20
)

// piece is something to be written to the image. It holds a reference to a block of the stream or owns a buffer.
type piece struct {
	at     int64
	data   []byte
	block  *block
	buffer []byte
}

// space hands out the room in an image, from its beginning to its end, and what is put there to the goroutine that writes it. The
// content of files goes to blocks of its own; inodes, with the ends of files that fit beside them, share extents of outBytes,
// so that both are written in large pieces while they arrive. Blocks that are never written are holes of the file.
type space struct {
	ctx   context.Context
	clock *clock // of the parser, which may have to wait here
	file  *os.File
	next  int64 // first byte that is not handed out, at a block

	pieces  chan piece
	buffers chan []byte

	content   []byte // being filled, nil if there is none
	contentAt int64

	shared   []byte // being filled, nil if there is none
	sharedAt int64
	used     [outBytes / erofs.BlockSize]uint16 // of shared's blocks

	writing clock // the writer's
}

func newSpace(p *parser, file *os.File) *space {
	s := &space{
		ctx: p.ctx, clock: &p.clock, file: file, next: erofs.BlockSize,
		pieces: make(chan piece, 4), buffers: make(chan []byte, outBuffers),
	}
	for range outBuffers {
		s.buffers <- nil // made when it is needed
	}
	return s
}

// blocks is how many blocks so many bytes take.
func blocks(bytes int64) int64 { return (bytes + erofs.BlockSize - 1) / erofs.BlockSize }

// reserve hands out whole blocks.
func (s *space) reserve(bytes int64) (at int64, err error) {
	at = s.next
	if s.next += blocks(bytes) * erofs.BlockSize; s.next > erofs.MaxBlocks*erofs.BlockSize || s.next < at {
		return 0, fmt.Errorf("%w: it takes over %d blocks", ErrNoImage, int64(erofs.MaxBlocks))
	}
	return at, nil
}

func (s *space) buffer() ([]byte, error) {
	s.clock.pause()
	defer s.clock.resume()
	select {
	case b := <-s.buffers:
		if b == nil {
			b = make([]byte, outBytes)
		}
		return b, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

func (s *space) send(p piece) error {
	s.clock.pause()
	defer s.clock.resume()
	select {
	case s.pieces <- p:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// gather hands out blocks for a little content, and the memory to put it in.
func (s *space) gather(size int64) (at int64, into []byte, err error) {
	whole := blocks(size) * erofs.BlockSize
	if s.content != nil && (s.contentAt+int64(len(s.content)) != s.next || int64(len(s.content))+whole > outBytes) {
		if err := s.flushContent(); err != nil {
			return 0, nil, err
		}
	}
	if s.content == nil {
		b, err := s.buffer()
		if err != nil {
			return 0, nil, err
		}
		s.content, s.contentAt = b[:0], s.next
	}
	if at, err = s.reserve(size); err != nil {
		return 0, nil, err
	}
	n := len(s.content)
	s.content = s.content[:n+int(whole)]
	clear(s.content[n+int(size):])
	return at, s.content[n : n+int(size)], nil
}

func (s *space) flushContent() error {
	b := s.content
	if b == nil {
		return nil
	}
	s.content = nil
	return s.send(piece{at: s.contentAt, data: b, buffer: b[:outBytes]})
}

// share hands out room beside others for an inode and what follows it, within one block, and the memory to put it in, which is
// zero. It takes the fullest block that has room.
func (s *space) share(size int) (at int64, into []byte, err error) {
	size = (size + erofs.SlotSize - 1) &^ (erofs.SlotSize - 1)
	best := -1
	if s.shared != nil {
		for i, used := range s.used {
			if int(used)+size <= erofs.BlockSize && (best < 0 || used > s.used[best]) {
				best = i
			}
		}
	}
	if best < 0 {
		if err := s.flushShared(); err != nil {
			return 0, nil, err
		}
		if s.shared, err = s.buffer(); err != nil {
			return 0, nil, err
		}
		if s.sharedAt, err = s.reserve(outBytes); err != nil {
			return 0, nil, err
		}
		clear(s.shared)
		clear(s.used[:])
		best = 0
	}
	off := best*erofs.BlockSize + int(s.used[best])
	s.used[best] += uint16(size)
	return s.sharedAt + int64(off), s.shared[off : off+size], nil
}

func (s *space) flushShared() error {
	b := s.shared
	if b == nil {
		return nil
	}
	s.shared = nil
	n := len(s.used)
	for n > 0 && s.used[n-1] == 0 {
		n--
	}
	if s.sharedAt+outBytes == s.next { // nothing came behind it
		s.next = s.sharedAt + int64(n)*erofs.BlockSize
	}
	return s.send(piece{at: s.sharedAt, data: b[:n*erofs.BlockSize], buffer: b})
}

// flush hands over what was gathered.
func (s *space) flush() error {
	if err := s.flushContent(); err != nil {
		return err
	}
	return s.flushShared()
}

// run writes pieces until the channel is closed.
func (s *space) run(ctx context.Context) error {
	s.writing.start()
	defer s.writing.stop()
	var written, begun int64
	for {
		s.writing.pause()
		var p piece
		var ok bool
		select {
		case p, ok = <-s.pieces:
		case <-ctx.Done():
			return ctx.Err()
		}
		s.writing.resume()
		if !ok {
			return nil
		}
		if err := pwriteAll(int(s.file.Fd()), p.data, p.at); err != nil {
			return err
		}
		if p.block != nil {
			p.block.release()
		} else {
			s.buffers <- p.buffer
		}
		// Extents of inodes lag behind by one at most, so this covers nearly all, and in large runs.
		if written += int64(len(p.data)); written-begun >= behindBytes {
			begun = written
			s.writeBehind(p.at + int64(len(p.data)))
		}
	}
}

// writeBehind has the disk begin with what was written so far. Only speed depends on it.
func (s *space) writeBehind(end int64) {
	_ = unix.SyncFileRange(int(s.file.Fd()), 0, end, unix.SYNC_FILE_RANGE_WRITE)
}
