package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// cursor is where a fetch stands: bytes before pos are handed over or in blk.
// It outlives attempts, so that a broken range is resumed and not repeated.
type cursor struct {
	span   *span
	pos    int64
	end    int64 // moved by takeRest only
	blk    *block
	lease  *lease // at the host that is asked, or the one to be asked
	parked bool   // it has waited for memory
	hedge  bool   // it is the span's second fetch
	waits  bool   // for the host, which awaited counts
	last   bool   // it has handed over the last byte

	awaited *stretches // of all fetches: waiting for a host
}

// fetch brings the span s, with as many attempts as it takes, and closes s.out.
// right is for the first of them, if it goes where it is for.
func (b *blob) fetch(ctx context.Context, s *span, right *lease) {
	defer close(s.out)
	defer s.cancel()
	defer s.finish()
	b.repo.client.metrics.ranges.Inc()
	at := &cursor{span: s, pos: s.off, end: s.end, lease: right, awaited: b.repo.client.metrics.awaited}
	err := b.repo.each(ctx, b.sites, &b.site, func(ctx context.Context, from site) (int64, error) {
		before := at.pos
		err := b.attempt(ctx, from, at)
		return at.pos - before, err
	})
	at.lease.park() // of an attempt that was not made
	b.repo.client.budget.give(at.blk)
	if err != nil && ctx.Err() == nil {
		s.second.Wait() // it may have what we could not get
	}
	if s.given.Load() == at.end && !at.last {
		return // it had
	}
	s.err = err
	if err != nil && ctx.Err() == nil {
		b.failOnce.Do(func() { close(b.failed) })
	}
}

// attempt asks one host for what is missing of the span, and reads as far as
// the connection holds. It is nil only when the span is complete.
func (b *blob) attempt(ctx context.Context, from site, at *cursor) error {
	at.catchUp()
	if at.pos >= at.end {
		return nil // the host before this one sent too much, but also all of it
	}
	if err := at.admit(ctx, from); err != nil {
		return err
	}
	defer at.rest()
	// Memory first: a request that then waits for it would idle at the registry.
	if err := b.needBlock(ctx, at); err != nil {
		return err
	}
	at.run()
	at.parked = false
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	asked, start := time.Now(), at.pos
	resp, err := b.ask(ctx, from, at)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answered := time.Since(asked)
	body := watch(ctx, cancel, resp.Body, b.repo.client.cfg.StallTimeout)
	if _, err := io.CopyN(io.Discard, body, at.pos-resp.first); err != nil {
		return fmt.Errorf("%s: skip to byte %d: %w", safeURL(resp.Request.URL), at.pos, unexpected(err))
	}
	if err := b.fill(ctx, body, at, resp.last+1); err != nil {
		return fmt.Errorf("%s: byte %d: %w", safeURL(resp.Request.URL), at.pos, err)
	}
	if brought := at.pos - start; !at.parked && brought >= b.repo.client.minRange() {
		from.sample(brought, answered, time.Since(asked))
	}
	return nil
}

// answer is what a host has to say to the request for a range, and the bytes
// that its body brings, both inclusive.
type answer struct {
	*http.Response
	first, last int64
}

// ask sends the request for what is missing of the span. The caller closes the
// body.
func (b *blob) ask(ctx context.Context, from site, at *cursor) (*answer, error) {
	header := http.Header{"Accept-Encoding": {"identity"}}
	if at.pos > 0 || at.end < b.layer.Size {
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", at.pos, at.end-1))
	}
	resp, err := b.repo.get(ctx, from, "blobs", b.layer.Digest.String(), header)
	if err != nil {
		return nil, err
	}
	first, last, err := answeredRange(resp, at.pos, at.end, b.layer.Size)
	if err != nil {
		err = fmt.Errorf("%s: %w", safeURL(resp.Request.URL), err)
	} else if resp.StatusCode == http.StatusPartialContent {
		from.ranges.Store(true)
	} else {
		err = b.takeAll(ctx, at)
	}
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	b.answerOnce.Do(func() { close(b.answered) })
	return &answer{resp, first, last}, nil
}

// admit waits until from may be asked, unless the cursor has the right to.
func (at *cursor) admit(ctx context.Context, from site) (err error) {
	if at.lease != nil && at.lease.pacer == from.pacer {
		return nil
	}
	at.lease.park()
	at.lease, err = from.acquire(ctx, true, from.last)
	return err
}

// run says that the host is being waited for, rest that it is not.
func (at *cursor) run() {
	if !at.waits {
		at.waits = true
		at.awaited.begin()
	}
	if !at.hedge {
		at.span.run()
	}
}

func (at *cursor) rest() {
	at.idle()
	at.lease.park()
	at.lease = nil
}

func (at *cursor) idle() {
	if at.waits {
		at.waits = false
		at.awaited.end()
	}
	if !at.hedge {
		at.span.rest()
	}
}

// catchUp leaves out what the span's other fetch has handed over.
func (at *cursor) catchUp() {
	if given := at.span.given.Load(); at.pos < given {
		at.pos = given
		if at.blk != nil {
			at.blk.n = 0
		}
	}
}

// takeAll is for a host that answers with all of the blob. Where that is not
// what was asked for, the span goes on to the end, and there are no others.
func (b *blob) takeAll(ctx context.Context, at *cursor) error {
	switch {
	case at.pos == 0 && at.end == b.layer.Size, at.span.end == b.end && !at.hedge:
		return nil
	case at.hedge:
		return fmt.Errorf("the whole blob to a range: %w", ErrProtocol)
	case b.takeRest(at.span):
		at.end = b.end
		return nil
	}
	<-ctx.Done() // the span before us that takes the rest cancels us, or our own second fetch
	return context.Cause(ctx)
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

// fill reads [at.pos, last) into blocks and hands them over. If the body should
// then be at its end it must be, which also frees the connection for the next
// range.
func (b *blob) fill(ctx context.Context, body io.Reader, at *cursor, last int64) error {
	end := min(last, at.end)
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
	if last > end {
		return nil
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

// needBlock waits for memory unless there is a block to fill. Meanwhile others
// may ask the host.
func (b *blob) needBlock(ctx context.Context, at *cursor) (err error) {
	budget := b.repo.client.budget
	if at.blk != nil {
		return nil
	}
	if at.blk, err = budget.tryTake(); at.blk != nil || err != nil {
		return err
	}
	defer at.pause()()
	at.blk, err = budget.take(ctx, at.span.head, b.reserve)
	return err
}

// pause lets others ask the host while the cursor waits for something else,
// until the returned function is called.
func (at *cursor) pause() (resume func()) {
	at.parked = true
	at.lease.park()
	at.idle()
	return func() {
		at.lease.resume()
		at.run()
	}
}

// handOver passes the block on when it is full or ends the span, except for what
// the span's other fetch has passed on before.
func (b *blob) handOver(ctx context.Context, at *cursor) error {
	if at.blk.n < len(at.blk.buf) && at.pos < at.end {
		return nil
	}
	s := at.span
	select {
	case <-s.turn:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { s.turn <- struct{}{} }()
	given := s.given.Load()
	if at.pos <= given {
		at.blk.n = 0
		return nil
	}
	at.blk.skip = int(max(given-(at.pos-int64(at.blk.n)), 0))
	if err := at.send(ctx); err != nil {
		return err
	}
	at.blk = nil
	at.last = at.pos == at.end
	s.given.Store(at.pos)
	return nil
}

// send gives the block to the reader. There is room for all of a span; only one
// that takes the rest of the blob may have to wait.
func (at *cursor) send(ctx context.Context) error {
	select {
	case at.span.out <- at.blk:
		return nil
	default:
	}
	defer at.pause()()
	select {
	case at.span.out <- at.blk:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
