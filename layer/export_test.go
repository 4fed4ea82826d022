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
