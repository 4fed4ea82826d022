package layer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"golang.org/x/sync/errgroup"
)

// FrameBytes is how much of the tar one frame of an Encoder has: a block of the pipeline, so that a frame is decoded straight
// into the memory that the next stage reads, and memory stays bounded by blocks. Frames of 1 MiB would be 4 % smaller with zstd,
// and of 2 MiB 7 %; LZ4, which looks back 64 KiB only, gains nothing.
const FrameBytes = blockSize

// Encoding is a form that Encoder writes.
type Encoding string

// The encodings: zstd where the link is what a pull waits for, LZ4 where the cores are.
const (
	EncodingZstd Encoding = "zstd"
	EncodingLZ4  Encoding = "lz4"
)

// Encoder writes a tar as independent frames that any tool can decode, with an index behind them. The same tar always gives the
// same bytes. Frames are compressed side by side. It belongs to one goroutine; Close ends the blob, and Abort gives it up: one
// of them has to be called.
type Encoder struct {
	encode func(src []byte) ([]byte, error)
	w      io.Writer
	buf    []byte
	index  []indexEntry // the writing goroutine's until it has ended
	frames chan chan encoded
	ended  sync.WaitGroup
	failed chan struct{} // closed when err is set
	err    error
	closed bool
}

type encoded struct {
	data []byte
	size int
	err  error
}

// NewEncoder makes an Encoder that writes to w, from a goroutine of its own.
func NewEncoder(w io.Writer, e Encoding) (*Encoder, error) {
	enc := &Encoder{w: w, frames: make(chan chan encoded, runtime.GOMAXPROCS(0)), failed: make(chan struct{})}
	switch e {
	case EncodingZstd:
		z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(FrameBytes), zstd.WithSingleSegment(true)) // so that every frame says its size
		if err != nil {
			return nil, err
		}
		enc.encode = func(src []byte) ([]byte, error) { return z.EncodeAll(src, nil), nil }
	case EncodingLZ4:
		enc.encode = encodeLZ4
	default:
		return nil, fmt.Errorf("no encoding is called %q: there are %s and %s", e, EncodingZstd, EncodingLZ4)
	}
	enc.ended.Go(enc.write)
	return enc, nil
}

// encodeLZ4 makes a frame of one independent block. High compression costs time here only: what it saves is bytes of the link.
// The frame is put together here because pierrec's Writer repeats a header whose checksum happens to be 0.
func encodeLZ4(src []byte) ([]byte, error) {
	const (
		flags    = 1<<6 | 1<<5 | 1<<3 // version, independent blocks, content size
		blockMax = 6 << 4             // 1 MiB, the next size that the format has
		header   = 4 + 2 + 8 + 1
	)
	out := make([]byte, header+4+lz4.CompressBlockBound(len(src))+4)
	binary.LittleEndian.PutUint32(out, lz4Magic)
	out[4], out[5] = flags, blockMax
	binary.LittleEndian.PutUint64(out[6:], uint64(len(src)))
	out[14] = byte(shortXXH32(out[4:14]) >> 8)
	hc := lz4.CompressorHC{Level: lz4.Level5}
	n, err := hc.CompressBlock(src, out[header+4:])
	if err != nil {
		return nil, err
	}
	head := uint32(n)
	if n == 0 || n >= len(src) {
		n = copy(out[header+4:], src)
		head = uint32(n) | lz4Stored
	}
	binary.LittleEndian.PutUint32(out[header:], head)
	end := header + 4 + n
	binary.LittleEndian.PutUint32(out[end:], 0)
	return out[:end+4], nil
}

// shortXXH32 is xxHash's XXH32 with seed 0 of less than 16 bytes, as LZ4's frame headers want it (xxhash_spec.md, 1).
func shortXXH32(b []byte) uint32 {
	const p1, p2, p3, p4, p5 = 2654435761, 2246822519, 3266489917, 668265263, 374761393
	h := uint32(p5) + uint32(len(b))
	for ; len(b) >= 4; b = b[4:] {
		h = bits.RotateLeft32(h+binary.LittleEndian.Uint32(b)*p3, 17) * p4
	}
	for _, c := range b {
		h = bits.RotateLeft32(h+uint32(c)*p5, 11) * p1
	}
	h = (h ^ h>>15) * p2
	h = (h ^ h>>13) * p3
	return h ^ h>>16
}

// Write implements io.Writer. Errors of the underlying writer may come late.
func (e *Encoder) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if e.buf == nil {
			e.buf = make([]byte, 0, FrameBytes)
		}
		n := min(len(p), FrameBytes-len(e.buf))
		e.buf, p = append(e.buf, p[:n]...), p[n:]
		if len(e.buf) < FrameBytes {
			break
		}
		if err := e.flush(); err != nil {
			return total - len(p), err
		}
	}
	return total, nil
}

// flush starts the compression of the frame.
func (e *Encoder) flush() error {
	src, out := e.buf, make(chan encoded, 1)
	e.buf = nil
	select {
	case e.frames <- out:
	case <-e.failed:
		return e.err
	}
	e.ended.Go(func() {
		data, err := e.encode(src)
		out <- encoded{data, len(src), err}
	})
	return nil
}

// write writes the frames in order. After an error it only empties the queue.
func (e *Encoder) write() {
	var err error
	for out := range e.frames {
		f := <-out
		if err != nil {
			continue
		}
		if err = f.err; err == nil {
			e.index = append(e.index, indexEntry{uint32(len(f.data)), uint32(f.size)})
			_, err = e.w.Write(f.data)
		}
		if err != nil {
			e.err = err
			close(e.failed)
		}
	}
}

// Close writes what is left and the index, and waits for it.
func (e *Encoder) Close() error {
	if e.closed {
		return e.err
	}
	if len(e.buf) > 0 {
		_ = e.flush() // its error is e.err
	}
	e.Abort()
	if e.err == nil {
		_, e.err = e.w.Write(appendIndex(nil, e.index))
	}
	return e.err
}

// Abort ends the Encoder, and waits until nothing is written any more. After Close it does nothing.
func (e *Encoder) Abort() {
	if !e.closed {
		e.closed = true
		close(e.frames)
		e.ended.Wait()
	}
}

// Decompress reads the blob from src to its end and writes the tar to w, and gives its size. What was written is right only if
// there is no error: digest and diffID are known to hold at the end. Errors are those of Unpack, and w's.
func (u *Unpacker) Decompress(ctx context.Context, src io.Reader, spec Spec, w io.Writer) (int64, error) {
	if err := spec.validate(); err != nil {
		return 0, err
	}
	q, err := u.arena.open(ctx)
	if err != nil {
		return 0, err
	}
	defer q.close()
	g, gctx := errgroup.WithContext(ctx)
	p := newPipeline(u, q, spec)
	var blob, tar hashStage
	g.Go(func() error { return p.fetch(gctx, src) })
	g.Go(func() error { return blob.run(gctx, p.toDigest, spec.Digest, "digest", p) })
	g.Go(func() error { return p.decompress(gctx) })
	g.Go(func() error { return tar.run(gctx, p.toDiffID, spec.DiffID, "diffID", p) })
	g.Go(func() error {
		var c clock
		r := &blockReader{ctx: gctx, blocks: p.toParse, clock: &c}
		for {
			if err := r.fill(); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if _, err := w.Write(r.rest); err != nil {
				return err
			}
			r.rest = nil
		}
	})
	err = g.Wait()
	if err == nil {
		err = p.sameDigest()
	}
	switch {
	case errors.Is(err, ErrCorrupt):
		return 0, err
	case err != nil:
		return 0, fmt.Errorf("decompress layer %s: %w", spec.Digest, err)
	}
	return p.decompressed, nil
}
