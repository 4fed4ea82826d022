package codepack_test

import (
	"archive/tar"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/internal/codepack"
)

// python is the version of the machine's own Python, MAJOR.MINOR.PATCH.
func python(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("python3", "-c", "import platform; print(platform.python_version())").Output()
	if err != nil {
		t.Skipf("there is no python3: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// compile packs a folder with what is compiled of it.
func compile(t testing.TB, dir, language, version string) (*codepack.Package, map[string]string) {
	t.Helper()
	tree := open(t, dir)
	c := tree.Compiler(language, version)
	if c == nil {
		t.Fatal("there is nothing to compile")
	}
	if err := c.Compile(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := pack(t, tree)
	return p, filesOf(t, p)
}

// filesOf are the files of a package, as a node finds them.
func filesOf(t testing.TB, p *codepack.Package) map[string]string {
	t.Helper()
	host, client, _ := registryServer(t)
	ref, err := p.Push(t.Context(), client, host+"/code/hello", new(atomic.Int64))
	if err != nil {
		t.Fatal(err)
	}
	image, err := client.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(tarOf(t, client, image)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			text, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			files[h.Name] = string(text)
		}
	}
}

// library is a folder with a function and what it imports, enough of it for several workers.
func library(t testing.TB) string {
	dir := t.TempDir()
	write(t, dir, "main.py", "import lib\nfrom lib import part0\n\ndef main(r): return {'a', 'b', 'c'} | lib.names\n", 0o644)
	write(t, dir, "lib/__init__.py", "names = frozenset({'x', 'y', 'z'})\n", 0o644)
	for n := range 24 {
		name := string(rune('a' + n))
		write(t, dir, "lib/part"+name+".py", "import lib\nclass "+name+":\n    def run(self, other): return other in {'one', 'two', 'three', '"+name+"'}\n", 0o644)
	}
	write(t, dir, "lib/part0.py", "value = 1\n", 0o644)
	return dir
}

// TestBytecode has the machine's Python load a package from its bytecode alone.
func TestBytecode(t *testing.T) {
	version := python(t)
	dir := library(t)
	write(t, dir, "broken.py", "def (:\n", 0o644)
	write(t, dir, "empty.py", "", 0o644)
	write(t, dir, "lib/tests/test_lib.py", "import lib\n", 0o644)
	write(t, dir, "tests/__init__.py", "mine = 1\n", 0o644) // at the top it is the user's own
	write(t, dir, "__pycache__/main.cpython-311.pyc", "of the user's own Python", 0o644)
	_, files := compile(t, dir, codepack.Python, version)
	tag := ".cpython-" + strings.Join(strings.Split(version, ".")[:2], "") + ".pyc"
	for source, want := range map[string]bool{"main": true, "lib/__init__": true, "lib/part0": true, "broken": false, "empty": false, "lib/tests/test_lib": false, "tests/__init__": true} {
		cache := filepath.Join(filepath.Dir(source), "__pycache__", filepath.Base(source)+tag)
		data, got := files[cache]
		if got != want {
			t.Errorf("%s: there is %v, want %v; the package has %q", cache, got, want, slices.Sorted(maps.Keys(files)))
		}
		if got && (len(data) < 16 || binary.LittleEndian.Uint32([]byte(data)[4:]) != 1) {
			t.Errorf("%s is not found by its source's hash alone: %q", cache, data[:min(len(data), 16)])
		}
	}
	work := t.TempDir() // where sources say otherwise than what was compiled of them, which is how it shows what is loaded
	for name, text := range files {
		if filepath.Ext(name) == ".py" {
			text = "raise SystemExit('the source was compiled: " + name + "')\n"
		}
		write(t, work, name, text, 0o644)
	}
	out, err := exec.Command("python3", "-c", "import sys; sys.path.insert(0, sys.argv[1]); import main; print(*sorted(main.main(None)), main.main.__code__.co_filename.endswith('main.py'))", work).CombinedOutput()
	if err != nil || string(out) != "a b c x y z True\n" {
		t.Errorf("main says %q, %v", out, err)
	}
}

// TestSameBytecode compiles the same code in two places.
func TestSameBytecode(t *testing.T) {
	version := python(t)
	one, first := compile(t, library(t), codepack.Python, version)
	two, second := compile(t, library(t), codepack.Python, version)
	if one.Digest() != two.Digest() {
		t.Error(cmp.Diff(first, second))
	}
	if len(first) != 2*27 {
		t.Errorf("the package has %d files: %q", len(first), slices.Sorted(maps.Keys(first)))
	}
}

// TestCompiledIsPacked changes a source after it was compiled.
func TestCompiledIsPacked(t *testing.T) {
	dir := library(t)
	tree := open(t, dir)
	if err := tree.Compiler(codepack.Python, python(t)).Compile(t.Context()); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "main.py", strings.Repeat("#", 100), 0o644)
	if got := filesOf(t, pack(t, tree))["main.py"]; !strings.HasPrefix(got, "import lib") {
		t.Errorf("it has %q, and the bytecode of something else", got)
	}
}

func TestNothingToCompile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "main.py", "", 0o644)
	for language, version := range map[string]string{codepack.Python: "3.11.2", codepack.Native: "", codepack.Java: "17", "mine": "1.2"} {
		if c := open(t, dir).Compiler(language, version); c != nil {
			t.Errorf("%s: %d sources to compile", language, c.Sources)
		}
	}
	write(t, dir, "main.py", "x = 1\n", 0o644)
	for _, version := range []string{"", "3", "x"} {
		if c := open(t, dir).Compiler(codepack.Python, version); c != nil {
			t.Errorf("version %q: %d sources to compile", version, c.Sources)
		}
	}
}

func TestNoCompiler(t *testing.T) {
	dir := library(t)
	programs := t.TempDir()
	t.Setenv("PATH", programs)
	for name, script := range map[string]string{
		"none": "", "of another version": "#!/bin/sh\nexit 3\n", "a shim of nothing": "#!/bin/sh\nexit 127\n",
	} {
		if script != "" {
			write(t, programs, "python3", script, 0o755)
		}
		if err := open(t, dir).Compiler(codepack.Python, "3.11.2").Compile(t.Context()); !errors.Is(err, codepack.ErrNoCompiler) || !strings.Contains(err.Error(), "python 3.11") {
			t.Errorf("%s: %v", name, err)
		}
	}
	write(t, programs, "python3", "#!/bin/sh\necho it is broken >&2\nexit 1\n", 0o755)
	tree := open(t, dir)
	if err := tree.Compiler(codepack.Python, "3.11.2").Compile(t.Context()); err == nil || errors.Is(err, codepack.ErrNoCompiler) || !strings.Contains(err.Error(), "it is broken") {
		t.Errorf("broken: %v", err)
	}
	if files := filesOf(t, pack(t, tree)); len(files) != 27 {
		t.Errorf("after that the package has %q", slices.Sorted(maps.Keys(files)))
	}
}

// TestCompiledTooLarge: code that fits is packed, whether or not what is compiled of it does.
func TestCompiledTooLarge(t *testing.T) {
	version, dir := python(t), library(t)
	tree, err := codepack.Open(dir, codepack.Limits{MaxFiles: 30})
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if err := tree.Compiler(codepack.Python, version).Compile(t.Context()); err == nil || !strings.Contains(err.Error(), "30 files") {
		t.Errorf("compiled: %v", err)
	}
	if files := filesOf(t, pack(t, tree)); len(files) != 27 {
		t.Errorf("the package has %q", slices.Sorted(maps.Keys(files)))
	}
}

// TestCompilersEnvironment: what the user has set for his own Python changes nothing.
func TestCompilersEnvironment(t *testing.T) {
	version, dir := python(t), library(t)
	plain, _ := compile(t, dir, codepack.Python, version)
	t.Setenv("PYTHONOPTIMIZE", "2")
	t.Setenv("PYTHONPYCACHEPREFIX", t.TempDir())
	t.Setenv("PYTHONHASHSEED", "7")
	if p, files := compile(t, dir, codepack.Python, version); p.Digest() != plain.Digest() {
		t.Errorf("the package has %q", slices.Sorted(maps.Keys(files)))
	}
	if _, err := os.Stat(filepath.Join(dir, "__pycache__")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the user's folder has bytecode: %v", err)
	}
}
