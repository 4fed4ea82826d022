package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// reader is the consumer's end of a blob.
type reader struct {
	blob *blob

	mu   sync.Mutex // guards what follows; held by Read while it waits for bytes
	span *span      // the one being read
	cur  *block     // the block being read
	pos  int        // read bytes of cur
	off  int64      // read bytes of the blob
	err  error      // sticky

	closed bool

	begun         time.Time     // when the span was begun
	waited        time.Duration // for its bytes
	waits, passed float64       // seconds waited, and passed in all, the latest spans counting most
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	data, err := r.next()
	if err != nil {
		return 0, err
	}
	n := copy(p, data)
	r.advance(n)
	return n, nil
}

// WriteTo implements io.WriterTo: blocks go to w without a copy.
func (r *reader) WriteTo(w io.Writer) (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var total int64
	for {
		data, err := r.next()
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(data)
		r.advance(n)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// Close implements io.Closer. It returns when nothing of the blob is left.
func (r *reader) Close() error {
	r.blob.cancel()
	r.blob.tasks.Wait() // which also wakes a Read that waits
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = fmt.Errorf("read layer %s: %w", r.blob.layer.Digest, io.ErrClosedPipe)
	}
	r.release()
	if !r.closed {
		r.closed = true
		r.blob.repo.client.budget.leave()
	}
	return nil
}

// release gives back every block, once all fetches have ended.
func (r *reader) release() {
	budget := r.blob.repo.client.budget
	budget.give(r.cur)
	r.cur = nil
	if r.span != nil {
		r.span.drain(budget)
	}
	for s := range r.blob.queue {
		s.drain(budget)
	}
}

// next returns bytes that are there to be read, at least one.
func (r *reader) next() ([]byte, error) {
	for r.err == nil {
		switch {
		case r.cur != nil:
			return r.cur.buf[r.pos:r.cur.n], nil
		case r.span != nil:
			r.nextBlock() // also after the last byte: was it really the last?
		case r.off == r.blob.end:
			r.blob.cancel()
			r.err = io.EOF
		default:
			r.nextSpan()
		}
	}
	return nil, r.err
}

func (r *reader) nextSpan() {
	r.begun, r.waited = time.Now(), 0
	starved := r.blob.repo.client.metrics.starved
	starved.begin()
	s, ok := <-r.blob.queue
	starved.end()
	if !ok {
		// The dispatcher stopped, and no span before said why: ctx has ended.
		r.fail(cmp.Or(r.blob.ended, context.Canceled))
		return
	}
	close(s.head)
	r.span = s
}

func (r *reader) nextBlock() {
	var blk *block
	var ok bool
	select {
	case blk, ok = <-r.span.out:
	default:
		starved, start := r.blob.repo.client.metrics.starved, time.Now()
		starved.begin()
		blk, ok = <-r.span.out
		starved.end()
		r.waited += time.Since(start)
	}
	switch {
	case ok:
		r.cur, r.pos = blk, blk.skip
	case r.span.err != nil:
		r.fail(r.span.err)
	default:
		r.widen()
		r.blob.done(r.span)
		r.span = nil
	}
}

// widen sets how far ahead of the reader is fetched. A reader that does not wait, having more to do than the link has, needs
// little ahead, and what is little stays in the caches; one that waits needs all that the host's pace allows for.
func (r *reader) widen() {
	r.waits = r.waits*7/8 + r.waited.Seconds()
	r.passed = r.passed*7/8 + time.Since(r.begun).Seconds()
	wide := r.blob.wide.Load()
	switch {
	case r.waits > r.passed/10:
		r.blob.wide.Store(min(wide+wide/2, 2*int64(r.blob.repo.client.cfg.MaxParallel)))
	case r.waits < r.passed/50:
		r.blob.wide.Store(max(wide-wide/4, minAhead+1))
	}
}

func (r *reader) fail(err error) {
	r.err = fmt.Errorf("read layer %s at byte %d: %w", r.blob.layer.Digest, r.off, err)
}

// advance gives the current block back once all of it is read.
func (r *reader) advance(n int) {
	r.pos += n
	r.off += int64(n)
	if r.pos == r.cur.n {
		r.blob.repo.client.budget.give(r.cur)
		r.cur = nil
	}
}
