// Package layer turns the blob of an OCI image layer into a tree, which is a directory or one EROFS image, fast, in bounded memory,
// and without trusting it.
//
// All stages of a layer overlap, one goroutine each, and hand one another blocks that they share instead of copying:
//
//	source ─┬─ blob digest
//	        └─ decompress ─┬─ diffID
//	                       └─ tar parser ── file writers, or one image
//
// The tree is what containerd's own applier would have made in the upper directory of an overlay: white-outs are character
// devices 0/0, opaque directories carry trusted.overlay.opaque. The bytes come from anywhere: paths are resolved one component
// at a time from directory handles, or among the names of an image, never by a string through the file system, so nothing is
// ever written outside the tree.
package layer

import (
	"cmp"
	"context"
	_ "crypto/sha256" // the algorithms that digests may name
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
)

// Limits bound what a layer may cost, against bombs. Zero means the default.
type Limits struct {
	MaxBytes   int64 // decompressed bytes of a layer, holes included; default 64 GiB
	MaxRatio   int64 // decompressed to compressed bytes, once more than 100 MiB came out; default 200
	MaxEntries int64 // entries of a layer's tar; default 5 million
}

const (
	defaultMaxBytes   = 64 << 30
	defaultMaxRatio   = 200
	defaultMaxEntries = 5_000_000
	// ratioFloor is the output below which the ratio is not looked at: a small layer of zeros is no attack.
	ratioFloor = 100 << 20

	// defaultMemory lets a dozen layers overlap and leaves most of a 256 MiB node agent to others.
	defaultMemory = 64 << 20
)

// Config is shared by all layers of a node.
type Config struct {
	Limits Limits
	// Writers is how many files of a layer are written at the same time; default: the cores, from 2 to 8.
	Writers int
	// MemoryBytes bounds the blocks and decoders of all layers in flight together; default 64 MiB. A layer waits until its guaranteed
	// share (3.8 MiB) is free. The window of a large zstd frame, and a mebibyte with it, is part of it, and so is LZ4's block, twice: a
	// frame that takes more than some two thirds is an ErrTooLarge. What comes on top is 1 MiB for each image in the making, and
	// their names, which all together may take a quarter as much again before one is an ErrNoImage.
	MemoryBytes int64
	// Lent is told how many of these bytes are in the garbage-collected heap, at the start and when that changes: those of decoders
	// are, blocks are not. It must not call back. Nil: nobody is told.
	Lent       func(bytes int64)
	Logger     *slog.Logger          // default: discard
	Registerer prometheus.Registerer // nil: no metrics
}

// Spec names a layer and what its bytes must be.
type Spec struct {
	Digest digest.Digest // of the blob as it travels
	DiffID digest.Digest // of the tar inside
	Size   int64         // of the blob; 0 if unknown
	// MediaType is not looked at: the format is told from the bytes.
	MediaType string
	// Indexed says that the blob must be what Encoder writes: frames of FrameBytes and an index at the end that agrees with them.
	Indexed bool
}

func (s Spec) validate() error {
	for _, d := range []digest.Digest{s.Digest, s.DiffID} {
		if err := d.Validate(); err != nil {
			return fmt.Errorf("digest %q: %w", d, err)
		}
	}
	return nil
}

// Result is what Unpack made.
type Result struct {
	CompressedBytes int64 // size of the blob
	TarBytes        int64 // size of the tar
	Bytes           int64 // allocated on disk
	Inodes          int64 // made in the tree, the root not counted
	// ImplicitDirs are the directories that had no entry of their own, parents before children, relative to the tree. They
	// want AdoptImplicitDirs once the parent layers are there.
	ImplicitDirs []string
	Timings      Timings

	slots map[string]uint64 // of the inodes of ImplicitDirs, if it is an image
}

// Unpacker unpacks layers. It is safe for concurrent use; all its layers share one budget of memory.
type Unpacker struct {
	limits   Limits
	writers  int
	arena    *arena
	decoders chan *frameDecoder // those that are free
	log      *slog.Logger
	metrics  *metrics

	names      atomic.Int64 // bytes of the names of images in the making
	namesBytes int64        // as many as there may be
}

// New makes an Unpacker.
func New(cfg Config) (*Unpacker, error) {
	if cfg.Limits.MaxBytes < 0 || cfg.Limits.MaxRatio < 0 || cfg.Limits.MaxEntries < 0 || cfg.Writers < 0 || cfg.MemoryBytes < 0 {
		return nil, errors.New("layer: limits, writers and memory must not be negative")
	}
	memory := cmp.Or(cfg.MemoryBytes, defaultMemory)
	if least := int64(layerBlocks * blockMemory); memory < least {
		return nil, fmt.Errorf("layer: %d bytes of memory cannot hold one layer, at least %d are needed", memory, least)
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("register layer metrics: %w", err)
	}
	decoders := make(chan *frameDecoder, max(min(int64(runtime.GOMAXPROCS(0)), maxFrameDecoders, memory/8/frameDecoderBytes), 1))
	for range cap(decoders) {
		decoders <- &frameDecoder{}
	}
	return &Unpacker{
		limits: Limits{
			MaxBytes:   cmp.Or(cfg.Limits.MaxBytes, defaultMaxBytes),
			MaxRatio:   cmp.Or(cfg.Limits.MaxRatio, defaultMaxRatio),
			MaxEntries: cmp.Or(cfg.Limits.MaxEntries, defaultMaxEntries),
		},
		writers:    cmp.Or(cfg.Writers, min(max(runtime.GOMAXPROCS(0), 2), 8)),
		arena:      newArena(memory-int64(cap(decoders))*frameDecoderBytes, cfg.Lent),
		namesBytes: memory / 4,
		decoders:   decoders,
		log:        cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler)),
		metrics:    m,
	}, nil
}

// Unpack reads the blob from src to its end and writes its tree under dir, an existing empty directory. It returns only when
// blob digest and diffID both held and every file is written; it does not sync. After an error the content of dir is anything,
// and the caller removes it.
//
// What is wrong with the bytes is a *CorruptError, which matches ErrCorrupt. Errors of src and of the disk are wrapped, so that
// errors.Is and errors.As find them. Unpack stops soon after ctx is done or a stage failed, but it waits for a Read of src that
// is under way: src must end with the same ctx.
func (u *Unpacker) Unpack(ctx context.Context, src io.Reader, spec Spec, dir string) (*Result, error) {
	return u.into(ctx, src, spec, func(p *parser) (sink, error) { return newExtractor(p, dir) })
}

// UnpackImage does the same, but writes the tree as one EROFS image to file, which it makes. The mounted image is what the
// directory would be, except that EROFS keeps no access times. A layer that cannot be an image is an ErrNoImage.
func (u *Unpacker) UnpackImage(ctx context.Context, src io.Reader, spec Spec, file string) (*Result, error) {
	return u.into(ctx, src, spec, func(p *parser) (sink, error) { return newImage(p, file) })
}

func (u *Unpacker) into(ctx context.Context, src io.Reader, spec Spec, open func(*parser) (sink, error)) (*Result, error) {
	res, err := u.unpack(ctx, src, spec, open)
	u.metrics.done(res, err)
	if err == nil {
		return res, nil
	}
	if errors.Is(err, ErrCorrupt) {
		return nil, err
	}
	return nil, fmt.Errorf("unpack layer %s: %w", spec.Digest, err)
}

func (u *Unpacker) unpack(ctx context.Context, src io.Reader, spec Spec, open func(*parser) (sink, error)) (*Result, error) {
	if err := spec.validate(); err != nil {
		return nil, err
	}
	q, err := u.arena.open(ctx)
	if err != nil {
		return nil, err
	}
	defer q.close()

	g, gctx := errgroup.WithContext(ctx)
	p := newPipeline(u, q, spec)
	x := newParser(gctx, p)
	if x.sink, err = open(x); err != nil {
		return nil, err
	}
	defer x.sink.close()

	var blob, tar hashStage
	g.Go(func() error { return p.fetch(gctx, src) })
	g.Go(func() error { return blob.run(gctx, p.toDigest, p.spec.Digest, "digest", p) })
	g.Go(func() error { return p.decompress(gctx) })
	g.Go(func() error { return tar.run(gctx, p.toDiffID, p.spec.DiffID, "diffID", p) })
	g.Go(x.run)
	x.sink.write(gctx, g)
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if err := p.sameDigest(); err != nil {
		return nil, err
	}
	res := &Result{CompressedBytes: p.fetched}
	x.clock.resume()
	if err := x.sink.finish(res); err != nil {
		return nil, err
	}
	x.clock.stop()

	res.Timings.Tar = x.clock.stage
	res.TarBytes = p.decompressed
	res.Timings.Fetch = p.fetchClock.stage
	res.Timings.Decompress = p.decompressClock.stage
	res.Timings.Digest, res.Timings.DiffID = blob.clock.stage, tar.clock.stage
	u.log.Debug("layer unpacked", "layer", spec.Digest, "format", p.format, "blob_bytes", p.fetched, "tar_bytes", p.decompressed, "inodes", res.Inodes)
	return res, nil
}
