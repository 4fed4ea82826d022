package layer

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

// pipeline is the stages of one layer up to the tar parser. Each stage is one goroutine; the fields below a stage's clock are
// its own until all have ended.
type pipeline struct {
	u     *Unpacker
	quota *quota
	spec  Spec

	toDigest, toDecompress chan *block
	toDiffID, toParse      chan *block

	fetchClock clock
	fetched    int64

	decompressClock clock
	format          format
	decompressed    int64

	consumed atomic.Int64 // compressed bytes that reached the decompressor; read by the parser for sparse files
	shared   atomic.Bool  // the blob is the tar, so the blob's digest is the diffID too; set before toDiffID is closed
}

func newPipeline(u *Unpacker, q *quota, spec Spec) *pipeline {
	return &pipeline{
		u: u, quota: q, spec: spec,
		toDigest: make(chan *block, inBlocks), toDecompress: make(chan *block, inBlocks),
		toDiffID: make(chan *block, 16), toParse: make(chan *block, 16),
	}
}

func (p *pipeline) corrupt(err error, format string, args ...any) error {
	return &CorruptError{Layer: p.spec.Digest, Reason: fmt.Sprintf(format, args...), Err: err}
}

// fetch reads the source into blocks.
func (p *pipeline) fetch(ctx context.Context, src io.Reader) error {
	c := &p.fetchClock
	c.start()
	defer c.stop()
	for end := false; !end; {
		c.pause()
		b, err := p.quota.input(ctx)
		c.resume()
		if err != nil {
			return err
		}
		n := 0
		for idle := 0; n < blockSize && !end; {
			m, err := src.Read(b.mem[n:blockSize])
			n += m
			switch {
			case err == io.EOF:
				end = true
			case err != nil:
				return err
			case m > 0:
				idle = 0
			default:
				if idle++; idle > 100 {
					return io.ErrNoProgress
				}
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		p.fetched += int64(n)
		if p.spec.Size > 0 && p.fetched > p.spec.Size {
			return p.corrupt(nil, "the blob is longer than the %d bytes that the manifest promises", p.spec.Size)
		}
		if n == 0 {
			b.release()
			break
		}
		b.data = b.mem[:n]
		if err := p.fan(ctx, c, b, p.toDigest, p.toDecompress); err != nil {
			return err
		}
	}
	if p.fetched == 0 {
		return p.corrupt(nil, "the blob is empty")
	}
	if p.spec.Size > 0 && p.fetched < p.spec.Size {
		return p.corrupt(nil, "the blob ends after %d of the %d bytes that the manifest promises", p.fetched, p.spec.Size)
	}
	close(p.toDigest)
	close(p.toDecompress)
	return nil
}

// fan hands one block to two stages.
func (p *pipeline) fan(ctx context.Context, c *clock, b *block, one, two chan<- *block) error {
	b.retain(1)
	if err := send(ctx, c, one, b); err != nil {
		return err
	}
	return send(ctx, c, two, b)
}

// decompress turns the blob's blocks into the tar's.
func (p *pipeline) decompress(ctx context.Context) error {
	c := &p.decompressClock
	c.start()
	defer c.stop()
	in := &blockReader{ctx: ctx, blocks: p.toDecompress, clock: c, count: &p.consumed}
	if err := in.fill(); err != nil {
		if err == io.EOF { // fetch reports it
			return nil
		}
		return err
	}
	p.format = sniff(in.rest)
	if p.format == formatTar {
		return p.passOn(ctx, in)
	}
	if err := p.decode(ctx, in); err != nil {
		if ctx.Err() != nil {
			return ctx.Err() // a decoder may have dressed it up
		}
		return err
	}
	close(p.toDiffID)
	close(p.toParse)
	return in.drain()
}

func (p *pipeline) decode(ctx context.Context, in *blockReader) error {
	if p.format != formatGzip {
		return p.decodeFrames(ctx, in)
	}
	c := &p.decompressClock
	dec, err := newGzipDecoder(in)
	if err != nil {
		return p.corrupt(err, "%s stream", p.format)
	}
	for {
		c.pause()
		b, err := p.quota.output(ctx)
		c.resume()
		if err != nil {
			return err
		}
		n, err := dec.decode(b)
		if err == io.EOF {
			b.release()
			return nil
		}
		if err := p.emit(ctx, c, b, n, err); err != nil {
			return err
		}
	}
}

// emit hands a decompressed block on, n bytes of it, or says why it cannot be.
func (p *pipeline) emit(ctx context.Context, c *clock, b *block, n int, err error) error {
	p.decompressed += int64(n)
	if err != nil {
		return p.corrupt(err, "%s stream breaks after %d bytes of output", p.format, p.decompressed)
	}
	if n == 0 {
		b.release()
		return nil
	}
	if err := p.bounded(p.decompressed); err != nil {
		return err
	}
	b.data = b.mem[window : window+n]
	return p.fan(ctx, c, b, p.toDiffID, p.toParse)
}

// passOn forwards the blocks of a blob that is a plain tar, uncopied. Unless the two digests are of different kinds they are
// one, and hashing once will do.
func (p *pipeline) passOn(ctx context.Context, in *blockReader) error {
	p.shared.Store(p.spec.Digest.Algorithm() == p.spec.DiffID.Algorithm())
	for {
		b := in.cur
		in.cur, in.rest = nil, nil
		p.decompressed += int64(len(b.data))
		if err := p.bounded(p.decompressed); err != nil {
			return err
		}
		p.decompressClock.pause()
		err := p.quota.promote(ctx, b)
		p.decompressClock.resume()
		if err != nil {
			return err
		}
		if p.shared.Load() {
			err = send(ctx, &p.decompressClock, p.toParse, b)
		} else {
			err = p.fan(ctx, &p.decompressClock, b, p.toDiffID, p.toParse)
		}
		if err != nil {
			return err
		}
		if err := in.fill(); err == io.EOF {
			close(p.toDiffID)
			close(p.toParse)
			return nil
		} else if err != nil {
			return err
		}
	}
}

// bounded refuses a layer of which more came out than the limits allow.
func (p *pipeline) bounded(out int64) error {
	l := p.u.limits
	if out > l.MaxBytes {
		return p.corrupt(nil, "it unpacks to more than %d bytes; if it is meant to, raise --layer-max-bytes", l.MaxBytes)
	}
	if in := p.consumed.Load(); out > ratioFloor && out/l.MaxRatio > in {
		return p.corrupt(nil, "%d bytes unpack to %d or more, over %d to 1; if they are meant to, raise --layer-max-ratio", in, out, l.MaxRatio)
	}
	return nil
}

// hashStage checks one digest.
type hashStage struct {
	clock clock
}

func (h *hashStage) run(ctx context.Context, blocks <-chan *block, want digest.Digest, what string, p *pipeline) error {
	h.clock.start()
	defer h.clock.stop()
	r := &blockReader{ctx: ctx, blocks: blocks, clock: &h.clock}
	sum := want.Algorithm().Hash()
	for {
		if err := r.fill(); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		sum.Write(r.rest)
		r.rest = nil
	}
	if blocks == p.toDiffID && p.shared.Load() {
		return nil
	}
	if got := digest.NewDigest(want.Algorithm(), sum); got != want {
		return p.corrupt(nil, "%s mismatch: want %s, got %s", what, want, got)
	}
	return nil
}

// sameDigest checks the diffID of a blob that was hashed only once. The blob's own digest did hold.
func (p *pipeline) sameDigest() error {
	if p.shared.Load() && p.spec.DiffID != p.spec.Digest {
		return p.corrupt(nil, "diffID mismatch: want %s, got %s", p.spec.DiffID, p.spec.Digest)
	}
	return nil
}
