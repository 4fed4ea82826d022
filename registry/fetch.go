package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// cursor is where a fetch stands: bytes before pos are handed over or in blk.
// It outlives attempts, so that a broken range is resumed and not repeated.
type cursor struct {
	*span
	pos int64
	blk *block
}

// fetch brings the span s, with as many attempts as it takes, and closes s.out.
func (b *blob) fetch(ctx context.Context, s *span) {
	defer close(s.out)
	defer s.cancel()
	at := &cursor{span: s, pos: s.off}
	s.err = b.repo.each(ctx, b.sites, &b.site, func(ctx context.Context, from site) (int64, error) {
		before := at.pos
		err := b.attempt(ctx, from, at)
		return at.pos - before, err
	})
	b.repo.client.budget.give(at.blk)
	if s.err != nil && ctx.Err() == nil {
		b.failOnce.Do(func() { close(b.failed) })
	}
}

// attempt asks one host for what is missing of the span, and reads as far as
// the connection holds. It is nil only when the span is complete.
func (b *blob) attempt(ctx context.Context, from site, at *cursor) error {
	if at.pos == at.end {
		return nil // the host before this one sent too much, but also all of it
	}
	// Memory first: a request that then waits for it would idle at the registry.
	if err := b.needBlock(ctx, at); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	header := http.Header{"Accept-Encoding": {"identity"}}
	whole := at.pos == 0 && at.end == b.layer.Size
	if !whole {
		header["Range"] = []string{fmt.Sprintf("bytes=%d-%d", at.pos, at.end-1)}
	}
	resp, err := b.repo.get(ctx, from, "blobs", b.layer.Digest.String(), header)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	first, last, err := answeredRange(resp, at.pos, at.end, b.layer.Size)
	if err != nil {
		return fmt.Errorf("%s: %w", safeURL(resp.Request.URL), err)
	}
	if resp.StatusCode == http.StatusPartialContent {
		from.ranges.Store(true)
	} else if !b.takeRest(at.span) {
		<-ctx.Done() // the span before us that takes the rest cancels us
		return context.Cause(ctx)
	}
	b.answerOnce.Do(func() { close(b.answered) })
	body := watch(ctx, cancel, resp.Body, b.repo.client.cfg.StallTimeout)
	if _, err := io.CopyN(io.Discard, body, at.pos-first); err != nil {
		return fmt.Errorf("%s: skip to byte %d: %w", safeURL(resp.Request.URL), at.pos, unexpected(err))
	}
	if err := b.fill(ctx, body, at, last+1); err != nil {
		return fmt.Errorf("%s: byte %d: %w", safeURL(resp.Request.URL), at.pos, err)
	}
	return nil
}

// answeredRange says which bytes the body of resp brings, both inclusive, when
// [pos, end) of size bytes was asked for. A registry may send less, or all of
// it; what it may not do is begin elsewhere or disagree about the size.
func answeredRange(resp *http.Response, pos, end, size int64) (first, last int64, err error) {
	if resp.StatusCode != http.StatusPartialContent {
		if resp.StatusCode != http.StatusOK {
			return 0, 0, fmt.Errorf("status %d to a range: %w", resp.StatusCode, ErrProtocol)
		}
		return 0, size - 1, checkLength(resp, size)
	}
	cr, err := parseContentRange(resp.Header.Get("Content-Range"))
	if err != nil {
		return 0, 0, err
	}
	if cr.total >= 0 && cr.total != size {
		return 0, 0, fmt.Errorf("registry has %d bytes, descriptor %d: %w", cr.total, size, ErrSize)
	}
	if cr.first != pos || cr.last >= end {
		return 0, 0, fmt.Errorf("asked for bytes %d-%d, got %d-%d: %w", pos, end-1, cr.first, cr.last, ErrProtocol)
	}
	return cr.first, cr.last, checkLength(resp, cr.last-cr.first+1)
}

// checkLength compares a promised Content-Length, if there is one.
func checkLength(resp *http.Response, want int64) error {
	switch got := resp.ContentLength; {
	case got < 0 || got == want:
		return nil
	case got < want:
		return fmt.Errorf("body of %d bytes, not %d: %w: %w", got, want, ErrSize, io.ErrUnexpectedEOF)
	default:
		return fmt.Errorf("body of %d bytes, not %d: %w", got, want, ErrSize)
	}
}

// fill reads [at.pos, end) into blocks and hands them over. Then the body must
// be at its end, which also frees the connection for the next range.
func (b *blob) fill(ctx context.Context, body io.Reader, at *cursor, end int64) error {
	for at.pos < end {
		if err := b.needBlock(ctx, at); err != nil {
			return err
		}
		free := at.blk.buf[at.blk.n:]
		n, err := body.Read(free[:min(int64(len(free)), end-at.pos)])
		at.blk.n += n
		at.pos += int64(n)
		if herr := b.handOver(ctx, at); herr != nil {
			return herr
		}
		if err != nil && at.pos < end {
			return unexpected(err)
		}
	}
	if at.pos < at.end {
		return io.ErrUnexpectedEOF // a shorter range than asked for, but an honest one
	}
	if n, _ := body.Read(make([]byte, 1)); n > 0 {
		return fmt.Errorf("body goes on after byte %d: %w", end, ErrSize)
	}
	return nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// needBlock waits for memory unless there is a block to fill.
func (b *blob) needBlock(ctx context.Context, at *cursor) (err error) {
	if at.blk == nil {
		at.blk, err = b.repo.client.budget.take(ctx, at.head, b.reserve)
	}
	return err
}

// handOver passes the block on when it is full or ends the span.
func (b *blob) handOver(ctx context.Context, at *cursor) error {
	if at.blk.n < len(at.blk.buf) && at.pos < at.end {
		return nil
	}
	select {
	case at.out <- at.blk:
		at.blk = nil
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
