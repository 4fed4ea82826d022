package logfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxLine is how much of a line is held back until its end comes.
const maxLine = 64 << 10

// Writer writes to a file that is bounded.
type Writer struct {
	maxBytes int64

	mu    sync.Mutex // guards what follows, and the file's end
	end   *os.File   // which writes are appended to
	file  *os.File   // the same file, for what is not at its end
	start int64      // where what is kept begins
	lost  loss       // before start
	unsay loss       // could not be written, and is to be told
	open  *Stream    // whose line the file ends in; nil if it ends with a line's end
	also  *Mirror    // or nil
}

// loss is what is not in the file.
type loss struct{ lines, bytes int64 }

func (l *loss) add(text []byte) {
	l.lines += int64(bytes.Count(text, []byte("\n")))
	l.bytes += int64(len(text))
}

// Open opens a file to write to, and makes it if it is not there. It will take some maxBytes, which are 1 MiB at least. What is
// written goes to a mirror too, unless nil, which is the Writer's from then on.
func Open(path string, maxBytes int64, also *Mirror) (*Writer, error) {
	if maxBytes < 1<<20 {
		return nil, fmt.Errorf("log file %s: a bound of %d bytes is below 1 MiB", path, maxBytes)
	}
	end, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log file: %w", err)
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("log file: %w", err), end.Close())
	}
	return &Writer{maxBytes: maxBytes, end: end, file: file, also: also}, nil
}

// Close closes the file.
func (w *Writer) Close() error { return errors.Join(w.end.Close(), w.file.Close(), w.also.Close()) }

// Stream is one source of lines. Lines of several are not mixed. It is used by one goroutine.
type Stream struct {
	w    *Writer
	rest []byte // of a line whose end has not come
}

// Stream returns a new one.
func (w *Writer) Stream() *Stream { return &Stream{w: w} }

// Write takes text whose lines may end in a later call. It cannot fail: what cannot be written, because the disk is full, is counted
// and told when it can be.
func (s *Stream) Write(text []byte) {
	s.rest = append(s.rest, text...)
	whole := bytes.LastIndexByte(s.rest, '\n') + 1
	if len(s.rest)-whole >= maxLine {
		whole = len(s.rest)
	}
	s.put(whole)
}

// Flush writes what there is of a line.
func (s *Stream) Flush() { s.put(len(s.rest)) }

// Held tells whether there is a line without an end.
func (s *Stream) Held() bool { return len(s.rest) > 0 }

func (s *Stream) put(n int) {
	if n == 0 {
		return
	}
	s.w.append(s, s.rest[:n])
	s.rest = append(s.rest[:0], s.rest[n:]...)
}

func (w *Writer) append(from *Stream, text []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.also.pass(from, text)
	size := w.size()
	if size < w.start { // somebody has emptied it, and has what was there
		w.start, w.lost = 0, loss{}
	}
	var before []byte
	if w.open != nil && size > 0 && (w.open != from || w.unsay.bytes > 0) {
		before = append(before, '\n')
	}
	if w.unsay.bytes > 0 {
		before = append(before, w.unsay.note("could not be written here")...)
	}
	all := text
	if len(before) > 0 {
		all = append(before, text...)
	}
	n, err := w.end.Write(all)
	if n > 0 {
		w.open = nil
		if all[n-1] != '\n' {
			w.open = from
		}
	}
	if n >= len(before) {
		w.unsay = loss{}
	}
	if err != nil {
		w.unsay.add(text[max(0, n-len(before)):])
	}
	if size += int64(n); size-w.start > w.maxBytes {
		w.shorten(size)
	}
}

// size is 0 if it cannot be told.
func (w *Writer) size() int64 {
	info, err := w.end.Stat()
	if err != nil {
		return 0
	}
	return info.Size()
}

// note is a line about a loss.
func (l loss) note(how string) []byte {
	return fmt.Appendf(nil, "hearth: %d lines (%d bytes) %s\n", l.lines, l.bytes, how)
}

// shorten drops the oldest part, so that a quarter of the room is free. That is more than a line and a note take.
func (w *Writer) shorten(size int64) {
	cut := w.lineAfter(size-w.maxBytes*3/4, size)
	lost := w.lost
	w.count(&lost, w.start, cut, lost.bytes > 0)
	note := lost.note("before this were dropped, the oldest first: a log keeps its end")
	if err := unix.Fallocate(int(w.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, cut); err == nil {
		at := cut - int64(len(note))
		if _, err := w.file.WriteAt(note, at); err == nil {
			cut = at
		}
		w.start, w.lost = cut, lost
		return
	}
	w.count(&lost, cut, size, false)
	if w.end.Truncate(0) == nil {
		w.start, w.lost, w.open = 0, lost, nil
		_, _ = w.end.Write(lost.note("before this were dropped: a log is emptied when it is full")) // or else nothing is told
	}
}

// lineAfter finds the beginning of a line at offset or soon after; if there is none, offset.
func (w *Writer) lineAfter(offset, size int64) int64 {
	block := make([]byte, min(2*maxLine, size-offset))
	n, _ := w.file.ReadAt(block, offset) // what cannot be read has no lines
	return offset + int64(bytes.IndexByte(block[:n], '\n')) + 1
}

// count adds what is between two offsets, but for the note that it begins with if it is noted.
func (w *Writer) count(l *loss, from, to int64, noted bool) {
	block := make([]byte, maxLine)
	r := io.NewSectionReader(w.file, from, to-from)
	for {
		n, err := r.Read(block)
		text := block[:n]
		if noted && n > 0 {
			text, noted = text[bytes.IndexByte(text, '\n')+1:], false
		}
		l.add(text)
		if err != nil {
			return
		}
	}
}
