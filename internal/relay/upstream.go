package relay

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"time"
)

// maxKeptBytes is the size of a buffer for requests up to which it is used again.
const maxKeptBytes = 32 << 10

var errHeaderTooLarge = fmt.Errorf("the header of the answer is over %d bytes", maxHeaderBytes)

// upstream is a connection over which simple requests go.
type upstream struct {
	net.Conn
	in     *bufio.Reader // of a source
	idleAt time.Time     // since when, or when it was made
	header bool          // a header is read, of which
	left   int           // so many bytes may come
	begun  bool          // a byte of an answer has come
}

// source is what a connection is read from.
type source struct{ c *upstream }

// Read implements io.Reader.
func (s source) Read(b []byte) (int, error) {
	if s.c.header {
		if s.c.left == 0 {
			return 0, errHeaderTooLarge
		}
		b = b[:min(len(b), s.c.left)]
	}
	n, err := s.c.Conn.Read(b)
	s.c.left -= n
	s.c.begun = s.c.begun || n > 0
	return n, err
}

// quiet says whether an idle connection is as it should be, as far as that can be seen.
func (c *upstream) quiet() bool {
	raw := c.Conn
	if over, ok := raw.(interface{ NetConn() net.Conn }); ok { // TLS, under which nothing has to come either
		raw = over.NetConn()
	}
	conn, ok := raw.(*Conn)
	return !ok || conn.quiet()
}

// exchange makes the round trip of a simple request.
func (t *Transport) exchange(r *http.Request) (*http.Response, error) {
	var out *bytes.Buffer
	for {
		c, reused, err := t.connect(r.Context())
		switch {
		case err != nil && out != nil && r.Context().Err() == nil: // its body has been read: it must not look as if it could go elsewhere
			return nil, &Failure{fmt.Errorf("once more: %v", err), true, false} //nolint:errorlint // therefore
		case err != nil:
			closeBody(r)
			return nil, err
		}
		if out == nil { // and not before: until its body is read, the request can go elsewhere
			if out, _ = t.buffers.Get().(*bytes.Buffer); out == nil {
				out = new(bytes.Buffer)
			}
			defer t.giveBack(out)
			if err := r.Write(out); err != nil {
				t.keep(c) // nothing was sent on it
				return nil, err
			}
			if time.Since(c.idleAt) >= t.config.IdleTime { // its client has taken its time
				_ = c.Close() // its server may do so at any moment
				continue
			}
		}
		res, sent, err := t.send(c, r, out.Bytes())
		if err == nil {
			return res, nil
		}
		again := reused && !c.begun && (sent == 0 || repeatable(r))
		if !again || r.Context().Err() != nil {
			return nil, &Failure{err, reused, sent > 0}
		}
	}
}

func closeBody(r *http.Request) {
	if r.Body != nil {
		_ = r.Body.Close() // nothing was read of it
	}
}

func (t *Transport) giveBack(b *bytes.Buffer) {
	if b.Cap() <= maxKeptBytes {
		b.Reset()
		t.buffers.Put(b)
	}
}

// repeatable says whether a request that may have been received can be sent again.
func repeatable(r *http.Request) bool {
	if r.Body != nil && r.Body != http.NoBody {
		return false
	}
	switch r.Method {
	case "", http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	return r.Header["Idempotency-Key"] != nil || r.Header["X-Idempotency-Key"] != nil
}

// send sends a request over a connection, which is closed if that fails. It returns how many bytes went out.
func (t *Transport) send(c *upstream, r *http.Request, out []byte) (res *http.Response, sent int, err error) {
	ctx := r.Context()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // which ends whatever waits for it
	c.begun = false
	if sent, err = c.Write(out); err == nil {
		res, err = c.answer(r)
	}
	if err != nil {
		stop()
		_ = c.Close() // it says no more than err
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, sent, err
	}
	b := &body{content: res.Body, transport: t, conn: c, request: r, stop: stop, reusable: !res.Close && !r.Close}
	if res.Body == http.NoBody {
		b.end(b.reusable)
	} else {
		res.Body = b
	}
	return res, sent, nil
}

// answer reads an answer up to its body.
func (c *upstream) answer(r *http.Request) (*http.Response, error) {
	trace := httptrace.ContextClientTrace(r.Context())
	c.header, c.left = true, maxHeaderBytes
	defer func() { c.header = false }()
	for {
		res, err := http.ReadResponse(c.in, r)
		switch {
		case err != nil:
			return nil, err
		case res.StatusCode < 100 || res.StatusCode == http.StatusSwitchingProtocols:
			return nil, errAnswer
		case res.StatusCode >= 200:
			return res, nil
		}
		if trace != nil && trace.Got1xxResponse != nil {
			if err := trace.Got1xxResponse(res.StatusCode, textproto.MIMEHeader(res.Header)); err != nil {
				return nil, err
			}
		}
	}
}

// body is that of an answer. When it has been read to its end, its connection is free for another request.
type body struct {
	content   io.Reader
	transport *Transport
	conn      *upstream
	request   *http.Request
	stop      func() bool // of the watch for who gives up
	reusable  bool
	ended     bool
	closed    bool
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.closed {
		return 0, http.ErrBodyReadAfterClose
	}
	n, err := b.content.Read(p)
	if err == nil {
		return n, nil
	}
	b.end(b.reusable && err == io.EOF)
	if ctx := b.request.Context(); err != io.EOF && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return n, err
}

// Close implements io.Closer. A body that has not been read to its end costs its connection.
func (b *body) Close() error {
	b.closed = true
	b.end(false)
	return nil
}

// here says whether some of the body can be read without waiting for it.
func (b *body) here(res *http.Response) bool {
	has, _ := b.conn.in.Peek(b.conn.in.Buffered())
	if len(res.TransferEncoding) > 0 { // the line before a chunk says nothing yet
		line := bytes.IndexByte(has, '\n')
		return line >= 0 && line+1 < len(has)
	}
	return len(has) > 0
}

// end is told once that nothing more is to be read.
func (b *body) end(reuse bool) {
	if b.ended {
		return
	}
	b.ended = true
	if b.stop() && reuse {
		b.transport.keep(b.conn)
		return
	}
	_ = b.conn.Close() // nobody needs it any more
}
