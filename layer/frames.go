package layer

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"golang.org/x/sync/errgroup"
)

const (
	// maxFrameDecoders bounds the decoders of an Unpacker, and frameDecoderBytes is what each of them keeps.
	maxFrameDecoders  = 16
	frameDecoderBytes = 1 << 20
)

// frameDecoder decodes units. It is used by one goroutine at a time.
type frameDecoder struct {
	zstd    *zstd.Decoder // made when it is first needed
	scratch []byte        // for a unit that lies in several blocks
}

// decode writes what a unit unpacks to into dst. Checksums within the frames are not looked at: the blob's digest and the tar's
// diffID cover the same bytes.
func (d *frameDecoder) decode(f format, u *unit, dst []byte) (int, error) {
	if len(u.parts) > 1 && d.scratch == nil {
		d.scratch = make([]byte, 0, unitBytes)
	}
	src := u.bytes(d.scratch)
	if f == formatLZ4 {
		return decodeLZ4(u, src, dst[:u.bound])
	}
	if d.zstd == nil {
		var err error
		d.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecodeAllCapLimit(true), zstd.IgnoreChecksum(true))
		if err != nil {
			return 0, err
		}
	}
	// Room behind the block lets the decoder copy in strides.
	out, err := d.zstd.DecodeAll(src, dst[:0:blockSize+slack])
	if err == nil && len(out) > u.bound {
		err = errors.New("frame is longer than its header says")
	}
	return len(out), err
}

func decodeLZ4(u *unit, src, dst []byte) (int, error) {
	n := 0
	for _, p := range u.pieces {
		data := src[p.from:p.to]
		if p.stored {
			if len(data) > len(dst)-n {
				return n, errors.New("frame is longer than its header says")
			}
			n += copy(dst[n:], data)
			continue
		}
		m, err := lz4.UncompressBlock(data, dst[n:])
		if err != nil {
			return n, err
		}
		n += m
	}
	if n != u.bound {
		return n, errors.New("frame is shorter than its header says")
	}
	return n, nil
}

// task is a block of the tar in the making.
type task struct {
	block *block
	n     int // bytes that were made
	err   error
	busy  time.Duration
	done  chan struct{} // closed when the above is set
}

// frameStage is a pipeline's decompression of zstd and LZ4. One goroutine cuts the stream into units as it comes in; units are
// decoded side by side, by as many decoders as there are cores for all layers; another hands the results on in order. A
// block is taken for each unit before its turn, in the stream's order: so the next one to be handed on always has its memory.
//
// A frame that does not fit a block is decoded as a stream, by the goroutine that cuts, in memory that is taken for it.
type frameStage struct {
	p     *pipeline
	g     *errgroup.Group
	in    *blockReader
	clock clock // of cutting, and of decoding as a stream
	ready chan *task
	busy  time.Duration // of decoding units
}

func (p *pipeline) decodeFrames(ctx context.Context, in *blockReader) error {
	g, gctx := errgroup.WithContext(ctx)
	s := &frameStage{p: p, g: g, in: in, ready: make(chan *task, 2*cap(p.u.decoders))}
	p.decompressClock.pause()
	in.ctx, in.clock = gctx, &s.clock
	g.Go(func() error { return s.cut(gctx) })
	g.Go(func() error { return s.deliver(gctx) })
	err := g.Wait()
	in.ctx, in.clock = ctx, &p.decompressClock
	p.decompressClock.stage.Busy += s.clock.stage.Busy + s.busy
	p.decompressClock.resume()
	return err
}

// cut starts a task for each unit.
func (s *frameStage) cut(ctx context.Context) error {
	s.clock.start()
	defer s.clock.stop()
	split := &splitter{in: s.in, format: s.p.format}
	if s.p.spec.Indexed {
		split.index = &indexCheck{}
	}
	for {
		u, err := split.next()
		switch {
		case err == io.EOF:
			close(s.ready)
			return nil
		case err == errLarge:
			if ok, err := s.stream(ctx, split); !ok {
				return err
			}
			continue
		case err != nil && ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return s.fail(ctx, err)
		}
		t, err := s.task(ctx)
		if err != nil {
			return err
		}
		s.g.Go(func() error { return s.decode(ctx, u, t) })
		if err := s.put(ctx, t); err != nil {
			return err
		}
	}
}

func (s *frameStage) task(ctx context.Context) (*task, error) {
	s.clock.pause()
	defer s.clock.resume()
	b, err := s.p.quota.output(ctx)
	return &task{block: b, done: make(chan struct{})}, err
}

// fail ends the stream with an error, once all that was made before it has been handed on.
func (s *frameStage) fail(ctx context.Context, err error) error {
	t := &task{err: err, done: make(chan struct{})}
	close(t.done)
	return s.put(ctx, t)
}

func (s *frameStage) put(ctx context.Context, t *task) error {
	s.clock.pause()
	defer s.clock.resume()
	select {
	case s.ready <- t:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// decode does a task, once a decoder is free.
func (s *frameStage) decode(ctx context.Context, u *unit, t *task) error {
	var d *frameDecoder
	select {
	case d = <-s.p.u.decoders:
	case <-ctx.Done():
		return ctx.Err()
	}
	start := time.Now()
	t.n, t.err = d.decode(s.p.format, u, t.block.mem[window:])
	t.busy = time.Since(start)
	s.p.u.decoders <- d
	u.release()
	close(t.done)
	return nil
}

// stream decodes a large frame. It is false if nothing can come behind it.
func (s *frameStage) stream(ctx context.Context, split *splitter) (ok bool, err error) {
	frame, err := split.large()
	if err != nil {
		return false, s.fail(ctx, err)
	}
	s.clock.pause()
	l, err := s.p.u.arena.lend(ctx, frame.memory)
	s.clock.resume()
	if err != nil {
		return false, err
	}
	defer s.p.u.arena.repay(l)
	dec, err := frame.open(l)
	if err != nil {
		return false, s.fail(ctx, err)
	}
	defer dec.end()
	for {
		t, err := s.task(ctx)
		if err != nil {
			return false, err
		}
		t.n, t.err = dec.decode(t.block)
		close(t.done)
		switch {
		case t.err == io.EOF:
			t.block.release()
			return true, nil
		case t.err != nil && ctx.Err() != nil:
			return false, ctx.Err()
		}
		if err := s.put(ctx, t); err != nil || t.err != nil {
			return false, err
		}
	}
}

// deliver hands the tasks' blocks on, in order.
func (s *frameStage) deliver(ctx context.Context) error {
	var idle clock
	for {
		var t *task
		var ok bool
		select {
		case t, ok = <-s.ready:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !ok {
			return nil
		}
		select {
		case <-t.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		s.busy += t.busy
		if err := s.p.emit(ctx, &idle, t.block, t.n, t.err); err != nil {
			return err
		}
	}
}
