package layer

import (
	"context"
	"io"

	"golang.org/x/sync/errgroup"
)

// Format and Sniff let black-box tests name the formats.
type Format = format

const (
	Tar  = formatTar
	Gzip = formatGzip
	Zstd = formatZstd
	LZ4  = formatLZ4
)

func Sniff(head []byte) Format { return sniff(head) }

// ParseIndex gives the number of an index's entries.
func ParseIndex(payload []byte) (int, error) {
	entries, err := parseIndex(payload)
	return len(entries), err
}

// Memory tells how much is mapped for blocks, how much is lent to decoders, and how much both may be.
func (u *Unpacker) Memory() (mapped, lent, most int64) {
	a := u.arena
	a.mu.Lock()
	defer a.mu.Unlock()
	return int64(a.mapped) * blockMemory, int64(a.lent) * blockMemory, int64(a.total) * blockMemory
}

// DecodeOnly decompresses a blob without hashing it.
func (u *Unpacker) DecodeOnly(ctx context.Context, src io.Reader) error {
	q, err := u.arena.open(ctx)
	if err != nil {
		return err
	}
	defer q.close()
	g, ctx := errgroup.WithContext(ctx)
	p := newPipeline(u, q, Spec{})
	swallow := func(blocks <-chan *block) func() error {
		return func() error {
			r := &blockReader{ctx: ctx, blocks: blocks, clock: &clock{}}
			return r.drain()
		}
	}
	g.Go(func() error { return p.fetch(ctx, src) })
	g.Go(func() error { return p.decompress(ctx) })
	for _, blocks := range []<-chan *block{p.toDigest, p.toDiffID, p.toParse} {
		g.Go(swallow(blocks))
	}
	return g.Wait()
}
