package layer

import (
	"context"
	"io"
	"sync/atomic"
)

// blockReader reads a stream of blocks. It is used by one goroutine. It stops when ctx is done.
type blockReader struct {
	ctx    context.Context
	blocks <-chan *block
	clock  *clock
	count  *atomic.Int64 // if set: adds up the bytes that arrived
	// before is called before the reader may have to wait; a parser hands over there what still holds blocks.
	before func() error

	cur    *block
	rest   []byte // of cur, not yet read
	credit int64  // bytes that take gave out and that Read has still to pass over
	err    error  // sticky
}

// fill makes rest non-empty, or fails; io.EOF is the end of the stream.
func (r *blockReader) fill() error {
	for len(r.rest) == 0 {
		if r.err != nil {
			return r.err
		}
		if r.cur != nil {
			r.cur.release()
			r.cur = nil
		}
		if r.before != nil {
			if r.err = r.before(); r.err != nil {
				return r.err
			}
		}
		r.clock.pause()
		select {
		case b, ok := <-r.blocks:
			if !ok {
				r.err = io.EOF
			} else {
				r.cur, r.rest = b, b.data
				if r.count != nil {
					r.count.Add(int64(len(b.data)))
				}
			}
		case <-r.ctx.Done():
			r.err = r.ctx.Err()
		}
		r.clock.resume()
	}
	return nil
}

// Read copies out of the stream. Bytes that take gave out before are passed over first, their content is not delivered again.
func (r *blockReader) Read(p []byte) (int, error) {
	if r.credit > 0 && len(p) > 0 {
		n := min(int64(len(p)), r.credit)
		r.credit -= n
		return int(n), nil
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// take gives out up to max bytes without copying them, with a reference to their block that the caller must release. The same
// number of bytes is then owed to Read, which passes over them.
func (r *blockReader) take(max int64) ([]byte, *block, error) {
	if err := r.fill(); err != nil {
		return nil, nil, err
	}
	n := min(int64(len(r.rest)), max)
	data := r.rest[:n:n]
	r.rest = r.rest[n:]
	r.credit += n
	r.cur.retain(1)
	return data, r.cur, nil
}

// drain reads to the end of the stream, and forgets it.
func (r *blockReader) drain() error {
	r.credit = 0
	for {
		r.rest = nil
		if err := r.fill(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// send hands a block on; the block stays the sender's if it fails.
func send(ctx context.Context, c *clock, ch chan<- *block, b *block) error {
	select {
	case ch <- b:
		return nil
	default:
	}
	c.pause()
	defer c.resume()
	select {
	case ch <- b:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
