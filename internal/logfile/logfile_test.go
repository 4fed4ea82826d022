package logfile_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/hearth-serverless/hearth/internal/logfile"
)

const bound = 1 << 20

func open(t testing.TB, path string) *logfile.Writer {
	t.Helper()
	w, err := logfile.Open(path, bound, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// kept is what a reader finds who begins at offset.
func kept(t testing.TB, path string, offset int64) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	start, err := logfile.Start(f, offset)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(io.NewSectionReader(f, start, 1<<40))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func diskBytes(t testing.TB, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

// TestBound writes many times what is kept, and looks after each write: the disk never has more, the end is there, whole, and the
// first line says what is not.
func TestBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w := open(t, path)
	s := w.Stream()
	var written int64
	for n := range 8000 {
		line := fmt.Sprintf("%08d %s\n", n, strings.Repeat("x", n%2000))
		s.Write([]byte(line))
		written += int64(len(line))
		if got := diskBytes(t, path); got > bound+64<<10 {
			t.Fatalf("after %d bytes the file takes %d of the disk", written, got)
		}
	}
	lines := strings.Split(strings.TrimSuffix(string(kept(t, path, 0)), "\n"), "\n")
	var lost, lostBytes int64
	if _, err := fmt.Sscanf(lines[0], "hearth: %d lines (%d bytes) before this were dropped", &lost, &lostBytes); err != nil {
		t.Fatalf("the first line is %q: %v", lines[0], err)
	}
	if int(lost)+len(lines)-1 != 8000 {
		t.Errorf("%d lines are lost and %d are there, of 8000", lost, len(lines)-1)
	}
	var there int64
	for n, line := range lines[1:] {
		if want := fmt.Sprintf("%08d %s", int(lost)+n, strings.Repeat("x", (int(lost)+n)%2000)); line != want {
			t.Fatalf("line %d is %.40q, want %.40q", n, line, want)
		}
		there += int64(len(line)) + 1
	}
	if lostBytes+there != written || there < bound/2 {
		t.Errorf("%d bytes are lost and %d are there, of %d", lostBytes, there, written)
	}
	if got := kept(t, path, 12345); !bytes.HasPrefix(got, []byte("hearth: ")) {
		t.Errorf("from what is lost one reads on at %.40q", got)
	}
	all := kept(t, path, 0)
	if next := int64(bytes.IndexByte(all, '\n')) + 1; next > 0 {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := kept(t, path, info.Size()-int64(len(all))+next); !bytes.Equal(got, all[next:]) {
			t.Errorf("from the second line one reads %.40q", got)
		}
	}
}

// TestEmptied: whoever empties the file has what was there; nothing of it is told as lost.
func TestEmptied(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	s := open(t, path).Stream()
	for range 100 {
		s.Write(append(bytes.Repeat([]byte("x"), 32<<10), '\n'))
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	s.Write([]byte("anew\n"))
	if got := string(kept(t, path, 0)); got != "anew\n" {
		t.Errorf("it has %.60q", got)
	}
}

// TestStreams: lines of two streams are not mixed, and one that has no end is not kept for ever.
func TestStreams(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w := open(t, path)
	a, b := w.Stream(), w.Stream()
	a.Write([]byte("one, "))
	b.Write([]byte("two\nthree"))
	a.Write([]byte("whole\nfour"))
	a.Flush()
	b.Write([]byte(" too\n"))
	a.Write([]byte(" and more\n"))
	a.Write([]byte("the end"))
	if !a.Held() || b.Held() {
		t.Error("it does not know what it holds")
	}
	a.Flush()
	if got, want := string(kept(t, path, 0)), "two\none, whole\nfour\nthree too\n and more\nthe end"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	long := bytes.Repeat([]byte("y"), 200<<10)
	b.Write(long)
	if got := kept(t, path, 0); !bytes.HasSuffix(got, append([]byte("the end\n"), long...)) || b.Held() {
		t.Error("a line that does not end is held back for ever")
	}
}

// TestDiskFull: what cannot be written is counted, and told when there is room again.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 { // the one probe: as root nothing skips
		t.Skip("mounting wants root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path, hog := filepath.Join(dir, "log"), filepath.Join(dir, "hog")
	if err := os.WriteFile(hog, make([]byte, 128<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := logfile.Open(path, bound, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s := w.Stream()
	line := strings.Repeat("z", 1023) + "\n"
	for range 300 {
		s.Write([]byte(line))
	}
	if err := os.Remove(hog); err != nil {
		t.Fatal(err)
	}
	s.Write([]byte("there is room\n"))
	got := string(kept(t, path, 0))
	var lost, lostBytes int
	at := strings.Index(got, "hearth: ")
	if at < 0 {
		t.Fatal("nothing is told")
	}
	if _, err := fmt.Sscanf(got[at:], "hearth: %d lines (%d bytes) could not be written here", &lost, &lostBytes); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(got, "could not be written here\nthere is room\n") || strings.Count(got, "z\n")+lost != 300 || strings.Count(got, "z")+lostBytes < 300*1023 {
		t.Errorf("%d lines are told as lost, %d are there", lost, strings.Count(got, "z\n"))
	}
}

// TestCollect: all that comes is written, by line; a line that has no end comes after a while, no faster than the pace is, and what
// is left at once when the context ends.
func TestCollect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "log")
		w := open(t, path)
		out, outEnd := net.Pipe()
		errs, errsEnd := net.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- logfile.Collect(ctx, w, rate.NewLimiter(1<<10, 64<<10), out, errs) }()
		fmt.Fprint(outEnd, "no end")
		synctest.Wait()
		if got := string(kept(t, path, 0)); got != "" {
			t.Errorf("a line that may yet end is written: %q", got)
		}
		time.Sleep(2 * time.Second)
		if got := string(kept(t, path, 0)); got != "no end" {
			t.Errorf("after two seconds there is %q", got)
		}
		fmt.Fprint(errsEnd, "another\n")
		written := make(chan struct{})
		go func() {
			defer close(written)
			for n := range 20000 {
				fmt.Fprintln(outEnd, "line", n)
			}
			_, _ = outEnd.Close(), errsEnd.Close()
		}()
		time.Sleep(10 * time.Second)
		if got := len(kept(t, path, 0)); got < 64<<10 || got > 80<<10 {
			t.Errorf("after ten seconds there are %d bytes, want the burst of 64 KiB and 12 KiB more", got)
		}
		cancel()
		<-written
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		got := string(kept(t, path, 0))
		if !strings.HasPrefix(got, "no end\nanother\nline 0\n") || !strings.HasSuffix(got, "line 19999\n") || strings.Count(got, "line ") != 20000 {
			t.Errorf("%d bytes, %d lines: %.60q", len(got), strings.Count(got, "line "), got)
		}
	})
}

// marked gives all bytes but line ends a highest bit.
func marked(text []byte, bit byte) []byte {
	out := bytes.Clone(text)
	for n, c := range out {
		if c != '\n' {
			out[n] = c&0x7f | bit
		}
	}
	return out
}

// only has the bytes of one of two streams, which are told by their highest bit, without line ends.
func only(text []byte, bit byte) (out []byte) {
	for _, c := range text {
		if c != '\n' && c&0x80 == bit {
			out = append(out, c)
		}
	}
	return out
}

// FuzzStreams: however two streams' text comes, each byte of it is in the file, in its stream's order, with nothing but line ends
// between them.
func FuzzStreams(f *testing.F) {
	f.Add([]byte("a\nb"), []byte("c\n\n"), 2)
	f.Add([]byte("\x00\x00\n"), []byte(""), 1)
	f.Add(bytes.Repeat([]byte("x"), 70<<10), []byte("y"), 4096)
	f.Fuzz(func(t *testing.T, first, second []byte, step int) {
		if step < 1 || len(first)+len(second) > 256<<10 {
			t.Skip()
		}
		first, second = marked(first, 0), marked(second, 0x80)
		path := filepath.Join(t.TempDir(), "log")
		w := open(t, path)
		a, b := w.Stream(), w.Stream()
		for at := 0; at < max(len(first), len(second)); at += step {
			a.Write(first[min(at, len(first)):min(at+step, len(first))])
			b.Write(second[min(at, len(second)):min(at+step, len(second))])
		}
		a.Flush()
		b.Flush()
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(only(got, 0), only(first, 0)) || !bytes.Equal(only(got, 0x80), only(second, 0x80)) {
			t.Errorf("%q and %q became %q", first, second, got)
		}
	})
}

// FuzzStart: a file that anybody has made has a beginning within it.
func FuzzStart(f *testing.F) {
	f.Add([]byte("a\nb"), int64(0), int64(1))
	f.Add([]byte("\x00\x00x\n"), int64(8192), int64(3))
	f.Fuzz(func(t *testing.T, text []byte, hole, offset int64) {
		if hole < 0 || hole > 1<<30 || offset < 0 || len(text) > 1<<16 {
			t.Skip()
		}
		path := filepath.Join(t.TempDir(), "log")
		file, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.WriteAt(text, hole); err != nil {
			t.Fatal(err)
		}
		size := hole + int64(len(text))
		offset = min(offset, size)
		start, err := logfile.Start(file, offset)
		if err != nil || start < offset-256 && start != 0 || start > size+8<<20 { // a note is read from its beginning
			t.Errorf("of %d bytes, from %d: %d, %v", size, offset, start, err)
		}
	})
}
