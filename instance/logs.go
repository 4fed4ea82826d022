package instance

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/fsnotify/fsnotify"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/logfile"
)

// maxLine is the longest line that is sent in one piece.
const maxLine = 64 << 10

// maxTail bounds the lines that a caller may ask to begin with.
const maxTail = 1_000_000

// Logs implements NodeService. Lines come file after file, that which was written to last at the end; with follow, then each as
// it is written.
func (e *Engine) Logs(ctx context.Context, req *connect.Request[hearthv1.LogsRequest],
	stream *connect.ServerStream[hearthv1.LogsResponse],
) error {
	return connectError(e.streamLogs(ctx, req.Msg, stream.Send))
}

func (e *Engine) streamLogs(ctx context.Context, req *hearthv1.LogsRequest, send func(*hearthv1.LogsResponse) error) error {
	if err := checkLabel("function", strings.TrimPrefix(req.Function, runtimePrefix)); err != nil { // a Runtime's name is one too
		return err
	}
	if req.InstanceId != "" {
		if err := checkInstanceID(req.InstanceId); err != nil {
			return err
		}
	}
	if req.Tail < 0 || req.Tail > maxTail {
		return invalid("tail %d is not between 0 and %d", req.Tail, maxTail)
	}
	r := &logReader{store: e.logs, req: req, send: send, at: map[string]*position{}}
	if req.Follow {
		err := r.follow(ctx)
		if ctx.Err() != nil {
			return nil // a follower has no other way to end
		}
		return err
	}
	return r.read(ctx, true)
}

// logReader sends the lines of a Function's log files.
type logReader struct {
	store *logStore
	req   *hearthv1.LogsRequest
	send  func(*hearthv1.LogsResponse) error
	at    map[string]*position // by instance
}

// position is how far a file was sent, and the bytes of a line without end that come after.
type position struct {
	offset int64
	rest   []byte
}

// follow sends what is there and then what comes, until ctx is done. It sleeps until the kernel says that something was written.
func (r *logReader) follow(ctx context.Context) error {
	dir := r.store.dir(r.req.Function)
	watcher, err := watchDir(dir)
	if err != nil {
		return fmt.Errorf("watch logs of %s: %w", r.req.Function, err)
	}
	defer watcher.Close()
	if err := r.read(ctx, false); err != nil {
		return err
	}
	for {
		select {
		case event := <-watcher.Events:
			err = r.onEvent(ctx, event)
		case err = <-watcher.Errors:
			if errors.Is(err, fsnotify.ErrEventOverflow) { // look at all
				err = r.read(ctx, false)
			}
		case <-ctx.Done():
			return nil
		}
		if err != nil {
			return fmt.Errorf("follow logs of %s: %w", r.req.Function, err)
		}
	}
}

func watchDir(dir string) (*fsnotify.Watcher, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	if err := watcher.Add(dir); err != nil {
		return nil, errors.Join(err, watcher.Close())
	}
	return watcher, nil
}

func (r *logReader) onEvent(ctx context.Context, event fsnotify.Event) error {
	instance, isLog := strings.CutSuffix(filepath.Base(event.Name), logSuffix)
	if !isLog || !event.Has(fsnotify.Write|fsnotify.Create) || !r.wanted(instance) {
		return nil
	}
	return r.readFile(ctx, instance, event.Name, false)
}

func (r *logReader) wanted(instance string) bool {
	return r.req.InstanceId == "" || r.req.InstanceId == instance
}

// read sends everything that has not been sent. With final also the lines that have no end.
func (r *logReader) read(ctx context.Context, final bool) error {
	files, err := r.store.files(r.req.Function)
	if err != nil {
		return err
	}
	files = slices.DeleteFunc(files, func(f logFile) bool { return !r.wanted(f.instance) })
	if len(files) == 0 && final {
		return fmt.Errorf("logs of %s: there are none: %w", r.req.Function, errdefs.ErrNotFound)
	}
	if len(r.at) == 0 && r.req.Tail > 0 {
		if err := r.skip(files); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := r.readFile(ctx, f.instance, f.path, final); err != nil {
			return err
		}
	}
	return nil
}

// skip sets positions so that only the last lines of all files together are sent.
func (r *logReader) skip(files []logFile) error {
	left := int(r.req.Tail)
	for _, f := range slices.Backward(files) {
		offset, lines, err := tailOffset(f.path, left)
		if err != nil {
			return err
		}
		left -= lines
		r.at[f.instance] = &position{offset: offset}
	}
	return nil
}

// tailOffset finds where the last n lines of a file begin, and how many there are.
func tailOffset(path string, n int) (offset int64, lines int, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || n <= 0 || end == 0 {
		return end, 0, err
	}
	start, err := logfile.Start(f, 0)
	if err != nil {
		return 0, 0, err
	}
	return lineStart(f, start, end, n)
}

// lineStart reads backwards from end, which is beyond start, to the beginning of the nth line from there, or to start.
func lineStart(f io.ReaderAt, start, end int64, n int) (offset int64, lines int, err error) {
	block := make([]byte, 32<<10)
	for at := end; at > start; {
		from := max(start, at-int64(len(block)))
		b := block[:at-from]
		if _, err := f.ReadAt(b, from); err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		for i := len(b) - 1; i >= 0; i-- {
			if b[i] != '\n' || from+int64(i) == end-1 { // the end of the last line begins no other
				continue
			}
			if lines++; lines == n {
				return from + int64(i) + 1, lines, nil
			}
		}
		at = from
	}
	return start, lines + 1, nil
}

// readFile sends what one file has that was not sent. A file that became shorter was emptied, and begins anew; of one that has lost
// its beginning, what is kept comes next.
func (r *logReader) readFile(ctx context.Context, instance, path string, final bool) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		delete(r.at, instance)
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	p := r.at[instance]
	if p == nil {
		p = &position{}
		r.at[instance] = p
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() < p.offset {
		*p = position{}
	}
	// Not beyond the size of now: a Function that writes for ever does not keep its neighbours' lines from being sent.
	return r.readKept(ctx, instance, p, f, info.Size(), final)
}

// readKept sends what is between a position and end, without what is lost while it reads.
func (r *logReader) readKept(ctx context.Context, instance string, p *position, f *os.File, end int64, final bool) error {
	block := make([]byte, maxLine)
	for {
		n, err := f.ReadAt(block[:min(int64(len(block)), end-p.offset)], p.offset)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		start, err := logfile.Start(f, p.offset)
		if err != nil {
			return err
		}
		if start > p.offset {
			if *p = (position{offset: start}); start >= end {
				return nil
			}
			continue
		}
		last := p.offset+int64(n) >= end || n == 0
		if err := r.sendLines(ctx, instance, p, bytes.NewReader(block[:n]), final && last); err != nil || last {
			return err
		}
	}
}

func (r *logReader) sendLines(ctx context.Context, instance string, p *position, from io.Reader, final bool) error {
	buffered := bufio.NewReaderSize(from, maxLine)
	for {
		piece, err := buffered.ReadSlice('\n')
		p.offset += int64(len(piece))
		p.rest = append(p.rest, piece...)
		end := errors.Is(err, io.EOF)
		if err != nil && !end && !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
		whole := bytes.HasSuffix(p.rest, []byte("\n")) || final && end
		if err := r.sendRest(instance, p, whole); err != nil || end {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// sendRest sends what has been read of a line: all of it if it is whole, and otherwise as much of it as cannot become one piece.
func (r *logReader) sendRest(instance string, p *position, whole bool) error {
	for len(p.rest) > 0 && (whole || len(p.rest) >= maxLine) {
		n := min(len(p.rest), maxLine)
		line := bytes.TrimSuffix(p.rest[:n], []byte("\n"))
		if err := r.send(&hearthv1.LogsResponse{InstanceId: instance, Line: bytes.Clone(line)}); err != nil {
			return err
		}
		p.rest = append(p.rest[:0], p.rest[n:]...)
		if string(p.rest) == "\n" { // the end of a line that was exactly as long as a piece
			p.rest = p.rest[:0]
		}
	}
	return nil
}
