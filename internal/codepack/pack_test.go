package codepack_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/codepack"
	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

func write(t testing.TB, dir, name, content string, mode fs.FileMode) {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
}

func link(t testing.TB, dir, name, to string) {
	t.Helper()
	if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, path string) *codepack.Tree {
	t.Helper()
	tree, err := codepack.Open(path, codepack.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tree.Close)
	return tree
}

func pack(t testing.TB, tree *codepack.Tree) *codepack.Package {
	t.Helper()
	var done atomic.Int64
	p, err := tree.Pack(t.Context(), "python", "main.main", &done)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	if done.Load() != tree.Bytes() {
		t.Errorf("says that %d bytes were read, of %d", done.Load(), tree.Bytes())
	}
	return p
}

// code is a folder with some of everything.
func code(t testing.TB, order []int, umask fs.FileMode) string {
	dir := t.TempDir()
	steps := []func(){
		func() { write(t, dir, "main.py", "def main(r): return 'hello'\n", 0o644&^umask) },
		func() { write(t, dir, "bin/tool", "#!/bin/sh\n", 0o755&^umask) },
		func() { write(t, dir, "lib/big", strings.Repeat("some text ", 200_000), 0o666&^umask) },
		func() { write(t, dir, "lib/empty", "", 0o444&^umask) },
		func() { _ = os.MkdirAll(filepath.Join(dir, "folder"), 0o755); link(t, dir, "folder/up", "../main.py") },
		func() { link(t, dir, "dangling", "not/there") },
		func() { write(t, dir, "new\nline, \"quoted\" ünï -rf", "x", 0o600) },
		func() { write(t, dir, strings.Repeat("long/", 50)+strings.Repeat("n", 255), "x", 0o600) },
		func() { _ = os.MkdirAll(filepath.Join(dir, "lib", "nothing"), 0o700) },
		func() { write(t, dir, "__pycache__/main.pyc", "x", 0o600) },
	}
	for _, i := range order {
		steps[i%len(steps)]()
	}
	return dir
}

// TestSameCodeSameDigest packs the same code, made in another order, by another user, with another umask, at another time.
func TestSameCodeSameDigest(t *testing.T) {
	one := code(t, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 0o022)
	two := code(t, []int{9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, 0o077)
	err := filepath.WalkDir(two, func(path string, _ fs.DirEntry, err error) error {
		at := unix.NsecToTimespec(time.Date(2001, 2, 3, 4, 5, 6, 7, time.UTC).UnixNano())
		err = errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW))
		if os.Geteuid() == 0 {
			err = errors.Join(err, os.Lchown(path, 1234, 5678))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Setxattr(filepath.Join(two, "main.py"), "user.note", []byte("mine"), 0) // where there are any
	p, q := pack(t, open(t, one)), pack(t, open(t, two))
	if p.Digest() != q.Digest() {
		t.Errorf("digests differ: %s and %s", p.Digest(), q.Digest())
	}
	write(t, two, "main.py", "def main(r): return 'hullo'\n", 0o644)
	if r := pack(t, open(t, two)); r.Digest() == p.Digest() {
		t.Error("other code has the same digest")
	}
	write(t, one, "lib/empty", "", 0o755)
	if r := pack(t, open(t, one)); r.Digest() == p.Digest() {
		t.Error("who may execute what makes no difference")
	}
}

// registryServer is a registry, and how many bytes it was sent.
func registryServer(t testing.TB) (host string, client *registry.Client, sent *atomic.Int64) {
	t.Helper()
	backend, sent := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))), &atomic.Int64{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 0 {
			sent.Add(r.ContentLength)
		}
		backend.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return strings.TrimPrefix(server.URL, "http://"), client, sent
}

// TestPush reads a package back as a node does: it is what the folder has, and nothing of the machine.
func TestPush(t *testing.T) {
	host, client, sent := registryServer(t)
	p := pack(t, open(t, code(t, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 0o022)))
	var done atomic.Int64
	ref, err := p.Push(t.Context(), client, host+"/code/hello", &done)
	if err != nil {
		t.Fatal(err)
	}
	if ref != host+"/code/hello@"+p.Digest().String() || done.Load() != p.Size() {
		t.Errorf("pushed %s, %d of %d bytes", ref, done.Load(), p.Size())
	}
	before := sent.Load()
	done.Store(0)
	if again, err := p.Push(t.Context(), client, host+"/code/hello", &done); err != nil || again != ref || done.Load() != p.Size() {
		t.Errorf("pushed again: %s, %v", again, err)
	}
	if n := sent.Load() - before; n > 2000 || before < p.Size() {
		t.Errorf("%d bytes were sent at first, %d again", before, n)
	}
	image, err := client.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	if image.Digest != p.Digest() || len(image.Layers) != 1 {
		t.Fatalf("image %+v", image)
	}
	if diff := cmp.Diff(map[string]string{
		"./": "dir 755", "bin/": "dir 755", "folder/": "dir 755", "lib/": "dir 755", "lib/nothing/": "dir 755",
		"main.py": "644 def main(r): return 'hello'\n", "bin/tool": "755 #!/bin/sh\n", "lib/empty": "644 ",
		"lib/big": "644 2000000 bytes", "folder/up": "-> ../main.py", "dangling": "-> not/there", "new\nline, \"quoted\" ünï -rf": "644 x",
	}, contents(t, client, image)); diff != "" {
		t.Error(diff)
	}
}

// tarOf is an image's one layer.
func tarOf(t testing.TB, client *registry.Client, image *registry.Image) *bytes.Buffer {
	t.Helper()
	u, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	l := image.Layers[0]
	src, err := client.Open(t.Context(), image.Ref, l)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	var data bytes.Buffer
	if _, err := u.Decompress(t.Context(), src, layer.Spec{Digest: l.Digest, DiffID: l.DiffID, Size: l.Size, Indexed: true}, &data); err != nil {
		t.Fatal(err)
	}
	return &data
}

// contents describes the tar of an image's layer, but for the long names.
func contents(t *testing.T, client *registry.Client, image *registry.Image) map[string]string {
	t.Helper()
	found, last := map[string]string{}, ""
	for r := tar.NewReader(tarOf(t, client, image)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return found
		} else if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" || !h.ModTime.Equal(time.Unix(0, 0)) || h.Name < last && last != "./" {
			t.Errorf("%+v, after %q", h, last)
		}
		last = h.Name
		switch h.Typeflag {
		case tar.TypeDir:
			last = fmt.Sprintf("dir %o", h.Mode)
		case tar.TypeSymlink:
			last = "-> " + h.Linkname
		default:
			text, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			last = fmt.Sprintf("%o %s", h.Mode, text)
			if len(text) > 1000 {
				last = fmt.Sprintf("%o %d bytes", h.Mode, len(text))
			}
		}
		if !strings.HasPrefix(h.Name, "long/") {
			found[h.Name] = last
		}
		last = h.Name
	}
}

func TestSingleFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "real.py", "x", 0o600)
	write(t, dir, "other", "x", 0o600)
	link(t, dir, "hello.py", "real.py")
	tree := open(t, filepath.Join(dir, "hello.py"))
	if tree.Files() != 1 || tree.Bytes() != 1 {
		t.Errorf("%d files with %d bytes", tree.Files(), tree.Bytes())
	}
	if h, err := tree.Handler(codepack.Python, ""); h != "hello.main" || err != nil {
		t.Errorf("handler %q, %v", h, err)
	}
	pack(t, tree)
}

func TestRefused(t *testing.T) {
	for want, make := range map[string]func(dir string){
		"no such file": func(dir string) { _ = os.RemoveAll(dir) },
		"there is no file in it to pack": func(dir string) {
			write(t, dir, codepack.IgnoreFile, "", 0o600)
			_ = os.Mkdir(filepath.Join(dir, "d"), 0o755)
		},
		`link "out" to "../x" leads out of the code`: func(dir string) { link(t, dir, "out", "../x") },
		`link "abs" to "/etc/passwd" leads out`:      func(dir string) { link(t, dir, "abs", "/etc/passwd") },
		`link "l" to "d/../../x" leads out`:          func(dir string) { _ = os.Mkdir(filepath.Join(dir, "d"), 0o755); link(t, dir, "l", "d/../../x") },
		`link "l" to "deep/up/../x" leads out`: func(dir string) {
			_ = os.MkdirAll(filepath.Join(dir, "deep"), 0o755)
			link(t, dir, "deep/up", "..")
			link(t, dir, "l", "deep/up/../x")
		},
		`link "a" to "b" goes round in a circle`:        func(dir string) { link(t, dir, "a", "b"); link(t, dir, "b", "a") },
		`link "a" to "a/a" goes round`:                  func(dir string) { link(t, dir, "a", "a/a") },
		`"pipe" is neither a file, a folder nor a link`: func(dir string) { _ = unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600) },
		`"sub/sock" is neither a file, a folder`:        func(dir string) { socket(t, filepath.Join(dir, "sub"), "sock") },
		`the name ".wh.gone" begins with .wh.`:          func(dir string) { write(t, dir, ".wh.gone", "x", 0o600) },
		`the name "sub/.wh..wh..opq" begins with .wh.`:  func(dir string) { write(t, dir, "sub/.wh..wh..opq", "x", 0o600) },
		`the name "\xff" is not UTF-8`:                  func(dir string) { write(t, dir, "\xff", "x", 0o600) },
		codepack.IgnoreFile + ", line 1: not UTF-8":     func(dir string) { write(t, dir, codepack.IgnoreFile, "\xff", 0o600) },
		codepack.IgnoreFile + " is no file":             func(dir string) { _ = unix.Mkfifo(filepath.Join(dir, codepack.IgnoreFile), 0o600) },
		"more than 1 MiB, counted up to \"huge\"":       func(dir string) { write(t, dir, "huge", strings.Repeat("x", 1<<20+1), 0o600) },
		"more than 20 files and folders": func(dir string) {
			for i := range 21 {
				write(t, dir, fmt.Sprint(i), "", 0o600)
			}
		},
		"is longer than 255 bytes, or 4000 with its fold": func(dir string) { deep(t, dir) },
	} {
		dir := filepath.Join(t.TempDir(), "code")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, dir, "file", "x", 0o600)
		if strings.Contains(want, "no file in it") {
			_ = os.Remove(filepath.Join(dir, "file"))
		}
		make(dir)
		tree, err := codepack.Open(dir, codepack.Limits{MaxBytes: 1 << 20, MaxFiles: 20})
		if err == nil {
			tree.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func socket(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	t.Chdir(dir) // the whole path may be too long for a socket's
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		t.Fatal(err)
	}
}

// deep makes folders whose path is longer than can be said at once.
func deep(t *testing.T, dir string) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	for range 17 {
		name := strings.Repeat("d", 250)
		if err := root.Mkdir(name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := root.OpenRoot(name)
		if err != nil {
			t.Fatal(err)
		}
		_ = root.Close()
		root = next
	}
	_ = root.Close()
}

// TestIgnoredIsNotLookedAt leaves out what would be refused.
func TestIgnoredIsNotLookedAt(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, codepack.IgnoreFile, ".venv/\n*.sock\n.wh.*\nbig\n", 0o600)
	write(t, dir, "main.py", "x", 0o600)
	write(t, dir, ".wh.x", "x", 0o600)
	write(t, dir, "big", strings.Repeat("x", 100), 0o600)
	write(t, dir, ".venv/x", "x", 0o600)
	link(t, dir, ".venv/python", "/usr/bin/python3")
	_ = unix.Mkfifo(filepath.Join(dir, "a.sock"), 0o600)
	tree, err := codepack.Open(dir, codepack.Limits{MaxBytes: 50, MaxFiles: 1})
	if err != nil {
		t.Fatal(err)
	}
	tree.Close()
}

// TestChangedWhilePacked has the folder change after it was looked at.
func TestChangedWhilePacked(t *testing.T) {
	for name, change := range map[string]func(file string) error{
		"longer":  func(file string) error { return os.WriteFile(file, []byte("more than before"), 0o600) },
		"shorter": func(file string) error { return os.Truncate(file, 1) },
		"gone":    os.Remove,
		"folder":  func(file string) error { return errors.Join(os.Remove(file), os.Mkdir(file, 0o755)) },
		"pipe":    func(file string) error { return errors.Join(os.Remove(file), unix.Mkfifo(file, 0o600)) },
	} {
		dir := t.TempDir()
		write(t, dir, "main.py", "before", 0o600)
		tree := open(t, dir)
		if err := change(filepath.Join(dir, "main.py")); err != nil {
			t.Fatal(err)
		}
		if _, err := tree.Pack(t.Context(), "python", "", counter()); err == nil || !strings.Contains(err.Error(), `"main.py": changed while it was packed`) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	// A link that leads out, in a file's place: what it leads to must not get into the package.
	dir := t.TempDir()
	write(t, dir, "secret", "secret", 0o600)
	write(t, dir, "code/main.py", "before", 0o600)
	tree := open(t, filepath.Join(dir, "code"))
	_ = os.Remove(filepath.Join(dir, "code/main.py"))
	link(t, dir, "code/main.py", "../secret")
	if p, err := tree.Pack(t.Context(), "python", "", counter()); err == nil {
		p.Close()
		t.Error("followed a link out of the code")
	}
}

func TestPackIsInterrupted(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "main.py", "x", 0o600)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open(t, dir).Pack(ctx, "python", "", counter()); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestPushErrors(t *testing.T) {
	_, client, _ := registryServer(t)
	p := pack(t, open(t, code(t, []int{0}, 0)))
	if _, err := p.Push(t.Context(), client, "Not A Repository", counter()); err == nil || !strings.Contains(err.Error(), "Not A Repository") {
		t.Errorf("error %v", err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }))
	defer server.Close()
	if _, err := p.Push(t.Context(), client, strings.TrimPrefix(server.URL, "http://")+"/code/x", counter()); !errors.Is(err, registry.ErrUnauthorized) {
		t.Errorf("error %v", err)
	}
}

func counter() *atomic.Int64 { return &atomic.Int64{} }
