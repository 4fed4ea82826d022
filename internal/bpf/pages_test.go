package bpf_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/bpf"
)

func probePages(t *testing.T) *bpf.PageProbe {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("watching the page cache needs root")
	}
	p, err := bpf.NewPageProbe()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// ownGroup is the cgroup of version 2 that this process is in.
func ownGroup(t *testing.T) uint64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	_, path, ok := strings.Cut(string(text), "0::")
	if !ok {
		t.Skip("no cgroup of version 2")
	}
	top := t.TempDir()
	if err := unix.Mount("none", top, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(top, 0)
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(top, strings.TrimSpace(path)), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// TestPagesOfAnOldKernel has only the tracepoint that all kernels have: what comes into memory is seen, once.
func TestPagesOfAnOldKernel(t *testing.T) {
	p := probePages(t)
	bpf.ColdOnly(p)
	if p.SeesCached() {
		t.Error("it claims to see what was in memory")
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 64<<12), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &st), f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}

	var mu sync.Mutex
	seen := map[uint64]int{}
	w, err := p.Watch(bpf.Unified, 1<<20, func(a bpf.PageAccess) {
		mu.Lock()
		defer mu.Unlock()
		if a.Inode == st.Ino && a.Device == st.Dev {
			for i := range a.Pages {
				seen[a.Page+i]++
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	group := ownGroup(t)
	if err := w.Add(group, []uint64{st.Dev}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, f); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Flush(), w.Remove(group, []uint64{st.Dev})); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	for page := range uint64(64) {
		if seen[page] != 1 {
			t.Errorf("page %d was told %d times", page, seen[page])
		}
	}
}

// TestKilledWatcher leaves nothing in the kernel when the process that watches is killed.
func TestKilledWatcher(t *testing.T) {
	const env = "HEARTH_BPF_TEST_WATCH"
	p := probePages(t)
	if os.Getenv(env) != "" {
		w, err := p.Watch(bpf.Unified, 1<<20, func(bpf.PageAccess) {})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Add(1, []uint64{1}); err != nil {
			t.Fatal(err)
		}
		fmt.Println("programs", bpf.Programs(w))
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestKilledWatcher$")
	cmd.Env = append(os.Environ(), env+"=1")
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if killed := cmd.Process.Kill(); err != nil || killed != nil {
		t.Fatal(err, killed)
	}
	_ = cmd.Wait() // says that it was killed
	ids, ok := strings.CutPrefix(strings.TrimSpace(line), "programs [")
	if !ok {
		t.Fatalf("child said %q", line)
	}
	for _, id := range strings.Fields(strings.TrimSuffix(ids, "]")) {
		n, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		gone(t, ebpf.ProgramID(n))
	}
}

// gone waits until the kernel has freed a program, which it does some time after the last reference to it has gone.
func gone(t *testing.T, id ebpf.ProgramID) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, fs.ErrNotExist) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("program %d is still there", id)
		}
	}
}

func TestWatcherCloses(t *testing.T) {
	p := probePages(t)
	w, err := p.Watch(bpf.Unified, 1<<20, func(bpf.PageAccess) {})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(1, []uint64{1, 2}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if err := w.Flush(); err == nil {
		t.Error("a closed watcher flushes")
	}
}

// TestMillionRandomRecords has the decoder refuse what no program writes.
func TestMillionRandomRecords(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, 64)
	for range 1_000_000 {
		for i := 0; i < len(b); i += 8 {
			binary.NativeEndian.PutUint64(b[i:], r.Uint64()>>r.UintN(64))
		}
		checkPage(t, b[:r.UintN(65)])
	}
}

func checkPage(t *testing.T, b []byte) {
	t.Helper()
	a, err := bpf.DecodePage(b)
	if err == nil && (a.Pages == 0 || a.Pages > 1<<14 || a.Page > 1<<51) {
		t.Fatalf("decoded into %+v", a)
	}
}

func FuzzDecodePage(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 48))
	f.Add([]byte(strings.Repeat("\x01\x00\x00\x00\x00\x00\x00\x00", 6)))
	f.Add([]byte(strings.Repeat("\xff", 56)))
	f.Fuzz(checkPage)
}
