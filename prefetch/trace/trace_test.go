package trace_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/prefetch/trace"
)

// childEnv has the test program be a child that joins cgroups, does something with files, and ends.
const childEnv = "HEARTH_TRACE_TEST_CHILD"

func TestMain(m *testing.M) {
	switch mode := os.Getenv(childEnv); mode {
	case "":
		os.Exit(m.Run())
	default:
		for _, dir := range strings.Split(mode, ":") {
			must(os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0))
		}
		for _, arg := range os.Args[1:] {
			how, path, _ := strings.Cut(arg, "=")
			must(deeds[how](path))
		}
		if os.Getenv(heldEnv) != "" {
			fmt.Println("done")
			_, _ = io.Copy(io.Discard, os.Stdin)
		}
	}
}

// heldEnv has the child say when it is done, and stay until its input ends.
const heldEnv = "HEARTH_TRACE_TEST_HELD"

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

const page = 4096

// deeds are what children do with a file of 64 pages. Each needs page 40 at least.
var deeds = map[string]func(path string) error{
	"read": func(path string) error {
		_, err := os.ReadFile(path)
		return err
	},
	"pread": func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.ReadAt(make([]byte, 100), 40*page+17)
		return err
	},
	"mmap": func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, 64*page, unix.PROT_READ, unix.MAP_PRIVATE)
		if err != nil {
			return err
		}
		if m[40*page] == m[40*page+1] && m[40*page] == m[40*page+2] && m[40*page] == m[40*page+3] && m[40*page] == m[40*page+4] {
			fmt.Println("five equal bytes") // so that they are looked at
		}
		return unix.Munmap(m)
	},
	"sendfile": func(path string) error {
		return toPipe(path, func(from, to int) error {
			at := int64(40 * page)
			_, err := unix.Sendfile(to, from, &at, page)
			return err
		})
	},
	"splice": func(path string) error {
		return toPipe(path, func(from, to int) error {
			at := int64(40 * page)
			_, err := unix.Splice(from, &at, to, nil, page, 0)
			return err
		})
	},
	"exec": func(path string) error {
		err := exec.Command(path).Run()
		if left := (*exec.ExitError)(nil); errors.As(err, &left) {
			return nil // it did run
		}
		return err
	},
}

func toPipe(path string, move func(from, to int) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	return move(int(f.Fd()), int(w.Fd()))
}

// child does deeds, HOW=PATH, in cgroups.
func child(t testing.TB, groups []string, args ...string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), childEnv+"="+strings.Join(groups, ":"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("child: %v\n%s", err, out)
	}
}

// heldChild is child, but its process is there until release.
func heldChild(t testing.TB, groups []string, args ...string) (release func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), childEnv+"="+strings.Join(groups, ":"), heldEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("child: %v", err)
		}
	})
	t.Cleanup(release)
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("child: %v", err)
	}
	return release
}

// cgroup makes a cgroup below the one mounted at top, for the length of the test.
func cgroup(t testing.TB, top, name string) string {
	t.Helper()
	dir := filepath.Join(top, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// hierarchies are mount points of cgroups: those of the machine, of either version, or one of version 2 of the test's own.
func hierarchies(t testing.TB) map[string]string {
	t.Helper()
	needRoot(t)
	tops := map[string]string{}
	own := t.TempDir()
	if err := unix.Mount("none", own, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(own, 0); err != nil {
			t.Error(err)
		}
	})
	tops["version 2"] = own
	for _, top := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/blkio", "/sys/fs/cgroup/pids"} {
		if _, err := os.Stat(filepath.Join(top, "cgroup.procs")); err == nil {
			tops[filepath.Base(top)] = top
		}
	}
	return tops
}

// someHierarchy is one of them.
func someHierarchy(t testing.TB) string {
	t.Helper()
	tops := hierarchies(t)
	if top, ok := tops["memory"]; ok {
		return top
	}
	return tops["version 2"]
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("tracing of reads needs root")
	}
}

func newTracer(t testing.TB, methods ...string) *trace.Tracer {
	t.Helper()
	needRoot(t)
	tr, err := trace.New(slog.New(slog.DiscardHandler), methods...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

func begin(t testing.TB, tr *trace.Tracer, groups, roots []string) *trace.Recording {
	t.Helper()
	r, err := tr.Begin(groups, roots)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := r.End(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func end(t testing.TB, r *trace.Recording) trace.Trace {
	t.Helper()
	got, err := r.End()
	if err != nil {
		t.Fatal(err)
	}
	if got.Lost != 0 && got.Method != trace.Fanotify { // which counts what others on this machine open and delete at once
		t.Errorf("%d events lost", got.Lost)
	}
	return got
}

// tree makes files of 64 pages of random bytes, and as "program" a program.
func tree(t testing.TB, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		content := make([]byte, 64*page)
		if name == "program" {
			self, err := os.Executable()
			if err == nil {
				content, err = os.ReadFile(self)
			}
			if err != nil {
				t.Fatal(err)
			}
		} else {
			_, _ = rand.Read(content)
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// place has a tree somewhere: the root is what the tracer is told of, through is where it is used.
type place struct{ root, through string }

// places are the ways in which a layer's tree is used. On tmpfs there are none: it does not read through the page cache.
func places(t testing.TB, from string) map[string]place {
	t.Helper()
	all := map[string]place{
		"ext4":            {from, from},
		"overlay on ext4": {from, overlay(t, from)},
	}
	if image, ok := erofs(t, from); ok {
		all["EROFS"] = place{image, image}
		all["overlay on EROFS"] = place{image, overlay(t, image)}
	}
	return all
}

func mounted(t testing.TB, source, kind, options string) string {
	t.Helper()
	at := t.TempDir()
	if err := unix.Mount(source, at, kind, 0, options); err != nil {
		t.Fatalf("mount %s: %v", kind, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return at
}

// overlay mounts an overlay of dir below an empty one, writable.
func overlay(t testing.TB, dir string) string {
	t.Helper()
	writable := mounted(t, "tmpfs", "tmpfs", "")
	upper, work, empty := filepath.Join(writable, "upper"), filepath.Join(writable, "work"), filepath.Join(writable, "empty")
	for _, d := range []string{upper, work, empty} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return mounted(t, "overlay", "overlay", fmt.Sprintf("lowerdir=%s:%s,upperdir=%s,workdir=%s", empty, dir, upper, work))
}

// erofs makes an image of a tree as a pull does, and mounts it, where the kernel can.
func erofs(t testing.TB, dir string) (string, bool) {
	t.Helper()
	var tarball bytes.Buffer
	w := tar.NewWriter(&tarball)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	u, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "layer.erofs")
	d := digest.FromBytes(tarball.Bytes())
	if _, err := u.UnpackImage(t.Context(), &tarball, layer.Spec{Digest: d, DiffID: d}, file); err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	if err := unix.Mount(file, at, "erofs", unix.MS_RDONLY, ""); err != nil {
		t.Logf("no EROFS from a file on this kernel: %v", err)
		return "", false
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return at, true
}

// cold takes a file out of memory, as far as that goes.
func cold(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_ = f.Sync() // a read-only file system has nothing to write
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

func warm(t testing.TB, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(io.Discard, f); err != nil {
		t.Fatal(err)
	}
}

// of are the accesses of one file.
func of(t testing.TB, tr trace.Trace, path string) []trace.Access {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	var out []trace.Access
	for _, a := range tr.Accesses {
		if a.Device == st.Dev && a.Inode == st.Ino {
			out = append(out, a)
		}
	}
	return out
}

// has says whether a byte of the file is among them.
func has(accesses []trace.Access, at int64) bool {
	return slices.ContainsFunc(accesses, func(a trace.Access) bool { return a.Offset <= at && at < a.Offset+a.Length })
}

// sound fails if a page is there twice, or there are none of the file.
func sound(t testing.TB, accesses []trace.Access, size int64) {
	t.Helper()
	seen := map[int64]bool{}
	for _, a := range accesses {
		if a.Length <= 0 || a.Offset < 0 || a.Offset%page != 0 || a.Length%page != 0 || a.Offset+a.Length > (size+page-1)/page*page {
			t.Errorf("access %+v of a file of %d bytes", a, size)
		}
		for at := a.Offset; at < a.Offset+a.Length; at += page {
			if seen[at] {
				t.Errorf("page at %d is there twice", at)
			}
			seen[at] = true
		}
	}
}

func TestWhatIsNeededIsSeen(t *testing.T) {
	tr := newTracer(t)
	if tr.Method() != trace.EBPF {
		t.Skipf("method here is %s", tr.Method())
	}
	group := cgroup(t, someHierarchy(t), "hearth-trace-seen")
	var names []string
	for how := range deeds {
		if how != "exec" {
			names = append(names, how)
		}
	}
	slices.Sort(names)
	for name, at := range places(t, tree(t, append(names, "program", "untouched")...)) {
		for _, state := range []string{"cold", "warm"} {
			t.Run(name+"/"+state, func(t *testing.T) {
				args := []string{"exec=" + filepath.Join(at.through, "program")}
				for _, name := range names {
					args = append(args, name+"="+filepath.Join(at.through, name))
				}
				for _, name := range append(names, "program", "untouched") {
					warm(t, filepath.Join(at.root, name))
					if state == "cold" {
						cold(t, filepath.Join(at.root, name))
					}
				}
				r := begin(t, tr, []string{group}, []string{at.root})
				child(t, []string{group}, args...)
				got := end(t, r)
				for _, name := range names {
					accesses := of(t, got, filepath.Join(at.root, name))
					sound(t, accesses, 64*page)
					if !has(accesses, 40*page) {
						t.Errorf("%s was not seen, but %+v", name, accesses)
					}
					if name == "read" && !has(accesses, 63*page) {
						t.Errorf("the end of what was read was not seen, but %+v", accesses)
					}
				}
				if !has(of(t, got, filepath.Join(at.root, "program")), 0) {
					t.Error("the program was not seen")
				}
				if a := of(t, got, filepath.Join(at.root, "untouched")); len(a) > 0 {
					t.Errorf("what nobody touched was seen: %+v", a)
				}
			})
		}
	}
}
