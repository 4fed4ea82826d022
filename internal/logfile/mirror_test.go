package logfile_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/hearth-serverless/hearth/internal/logfile"
)

// mirrored is a Writer with a mirror: the standard output of a process that waits, whose other end is returned.
func mirrored(t *testing.T) (*logfile.Writer, *os.File, *os.Process) {
	t.Helper()
	r, end, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() }) // the test may have closed it
	p := exec.Command("sleep", "3600")
	p.Stdout = end
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Process.Kill(); _ = p.Wait() })
	info, err := end.Stat()
	if err != nil {
		t.Fatal(err)
	}
	inode := info.Sys().(*syscall.Stat_t).Ino
	if _, err := logfile.OpenMirror(uint32(p.Process.Pid), inode+1); err == nil {
		t.Error("a pipe is taken for another")
	}
	m, err := logfile.OpenMirror(uint32(p.Process.Pid), inode)
	if err := errors.Join(err, end.Close()); err != nil {
		t.Fatal(err)
	}
	w, err := logfile.Open(filepath.Join(t.TempDir(), "log"), bound, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w, r, p.Process
}

func read(t *testing.T, r io.Reader) string {
	t.Helper()
	block := make([]byte, 1<<20)
	n, err := r.Read(block)
	if err != nil {
		t.Fatal(err)
	}
	return string(block[:n])
}

// TestMirror: what is written is passed on by line; what there is no room for is told and holds up nobody; and a reader that has gone
// is no loss.
func TestMirror(t *testing.T) {
	w, r, _ := mirrored(t)
	a, b := w.Stream(), w.Stream()
	a.Write([]byte("one\ntwo "))
	b.Write([]byte("other\n"))
	a.Flush()
	b.Write([]byte("again\n"))
	if got, want := read(t, r), "one\nother\ntwo \nagain\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	line := []byte(strings.Repeat("x", 999) + "\n")
	for range 200 { // a pipe takes 64 KiB
		a.Write(line)
	}
	got := read(t, r)
	there := strings.Count(got, string(line))
	if there < 10 || there > 70 || len(got) != 1000*there {
		t.Errorf("of 200 lines there are %d, in %d bytes", there, len(got))
	}
	a.Write([]byte("and more\n"))
	if got, want := read(t, r), fmt.Sprintf("hearth: %d lines (%d bytes) before this were dropped here: there was no room\nand more\n", 200-there, 1000*(200-there)); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	long := bytes.Repeat([]byte("y"), 10000)
	a.Write(append(long, '\n'))
	if got := read(t, r); got != string(long)+"\n" {
		t.Errorf("a long line is %d bytes, %.40q", len(got), got)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	a.Write([]byte("to nobody\n"))
	a.Write([]byte("to nobody\n"))
}

// TestMirrorLetsGo: the pipe ends with the process, whoever still writes to the file.
func TestMirrorLetsGo(t *testing.T) {
	w, r, p := mirrored(t)
	w.Stream().Write([]byte("before\n"))
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(r)
	if err != nil || string(text) != "before\n" {
		t.Errorf("it ends with %q, %v", text, err)
	}
	w.Stream().Write([]byte("after\n"))
}

// TestMirrorIsPaced: whoever reads all gets no more than is good for him.
func TestMirrorIsPaced(t *testing.T) {
	w, r, _ := mirrored(t)
	passed := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, r) // until it is closed
		passed <- n
	}()
	synctest.Test(t, func(*testing.T) { // no time passes
		s := w.Stream()
		line := []byte(strings.Repeat("x", 999) + "\n")
		for range 20_000 {
			s.Write(line)
		}
	})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if n := <-passed; n > 4<<20 {
		t.Errorf("%d bytes were passed on", n)
	}
}
