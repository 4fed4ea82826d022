package codepack_test

import (
	"context"
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/codepack"
)

// program is the head of an ELF file.
func program(kind elf.Type, machine elf.Machine) string {
	head := make([]byte, 64)
	copy(head, elf.ELFMAG)
	head[elf.EI_CLASS], head[elf.EI_DATA] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB)
	head[16], head[18] = byte(kind), byte(machine)
	return string(head)
}

// folder makes one of files that have something in them. Names in bin/ and those of programs are executable.
func folder(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, f := range files {
		name, content, _ := strings.Cut(f, "=")
		write(t, dir, name, content+"\n", 0o755)
	}
	return dir
}

func TestGuess(t *testing.T) {
	elfFile := program(elf.ET_DYN, elf.EM_X86_64)
	for _, c := range []struct {
		files []string
		want  string // or a part of the error
	}{
		{[]string{"main.py"}, "python"},
		{[]string{"requirements.txt", "build.js"}, "python"},
		{[]string{"hello.py"}, "python"},
		{[]string{"package.json", "index.js", "build.py"}, "node"},
		{[]string{"app.mjs"}, "node"},
		{[]string{"hello.jar"}, "java"},
		{[]string{"Hello.java"}, "java"},
		{[]string{"Hello.class"}, "java"},
		{[]string{"main=" + elfFile}, "native"},
		{[]string{"main=" + program(elf.ET_EXEC, elf.EM_AARCH64), "README"}, "native"},
		{[]string{"fast.so=" + elfFile, "main.py"}, "python"},
		{[]string{"fast.so=" + elfFile}, "nothing at the top"},
		{[]string{"core=" + program(elf.ET_CORE, elf.EM_X86_64)}, "nothing at the top"},
		{[]string{"sub/main.py"}, "nothing at the top"},
		{[]string{"main.py", "package.json"}, "may be for node (package.json) or for python (main.py); name its runtime by --runtime"},
		{[]string{"a.py", "b.js"}, "may be for node (b.js) or for python (a.py)"},
	} {
		got, err := open(t, folder(t, c.files...)).Guess()
		if got != c.want && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%.40q: %q, %v; want %q", c.files, got, err, c.want)
		}
	}
}

func TestHandler(t *testing.T) {
	for _, c := range []struct {
		files                   []string
		file, language, handler string
		want                    string // or a part of the error
	}{
		{[]string{"main.py"}, "", "python", "", ""},
		{[]string{"main.py"}, "", "python", "a.b", "a.b"},
		{[]string{"hello.py"}, "hello.py", "python", "", "hello.main"},
		{[]string{"index.js"}, "index.js", "node", "", ""},
		{[]string{"app.js"}, "app.js", "node", "", "for example --handler app.handler"},
		{[]string{"serve"}, "serve", "native", "", "serve"},
		{[]string{"a.jar"}, "a.jar", "java", "", "--handler is missing: which class"},
		{[]string{"a.jar"}, "", "java", "x.Hello", "x.Hello"},
		{[]string{"Hello.java"}, "", "java", "Hello", "no jar and no class file: build it first"},
	} {
		got, err := open(t, filepath.Join(folder(t, c.files...), c.file)).Handler(c.language, c.handler)
		if (err != nil || got != c.want) && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%q: %q, %v; want %q", c.files, got, err, c.want)
		}
	}
}

func TestCheckProgram(t *testing.T) {
	dir := folder(t, "main="+program(elf.ET_DYN, elf.EM_X86_64), "bin/arm="+program(elf.ET_DYN, elf.EM_AARCH64), "script=#!/bin/sh")
	write(t, dir, "plain", program(elf.ET_DYN, elf.EM_X86_64), 0o644)
	link(t, dir, "link", "main")
	tree := open(t, dir)
	for handler, want := range map[string]string{
		"": "", "main": "", "./main": "", "link": "", "script": "", "bin/arm": "is a program for another machine", "bin": `has no program "bin"`, "none": `has no program "none"`,
		"plain": "may not be executed; chmod +x it",
	} {
		err := tree.CheckProgram(handler, "amd64")
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: error %v, want %q", handler, err, want)
		}
	}
	if err := open(t, filepath.Join(dir, "plain")).CheckProgram("plain", "amd64"); err != nil {
		t.Error(err)
	}
	if self, err := os.Executable(); err != nil || open(t, self).CheckProgram(filepath.Base(self), runtime.GOARCH) != nil {
		t.Error("this test is no program")
	}
}

func FuzzELF(f *testing.F) {
	f.Add([]byte(program(elf.ET_DYN, elf.EM_X86_64)))
	f.Add([]byte(program(elf.ET_EXEC, elf.EM_AARCH64))[:20])
	f.Add([]byte("\x7fELF\x02\x02"))
	f.Fuzz(func(t *testing.T, head []byte) {
		if m := codepack.ELFMachine(head); m != 0 && (len(head) < 20 || string(head[:4]) != elf.ELFMAG) {
			t.Errorf("%q is for machine %d", head, m)
		}
	})
}

// tool makes a script, and what it uses, all that is in $PATH.
func tool(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	for _, used := range []string{"mkdir", "cp", "ln", "mkfifo", "cat"} {
		program, err := exec.LookPath(used)
		if err != nil {
			program, err = exec.LookPath("/bin/" + used) // the tool before has changed $PATH
		}
		if err != nil {
			t.Fatal(err)
		}
		link(t, dir, used, program)
	}
	write(t, dir, name, "#!/bin/sh\n"+script, 0o755)
	t.Setenv("PATH", dir)
}

func TestInstallPython(t *testing.T) {
	// pip is called in the code's folder; what it installs does not replace the code's own, and the folder stays as it was.
	tool(t, "pip", `
[ "$1" = install ] && [ -f main.py ] || exit 9
while [ $# -gt 1 ]; do [ "$1" = --target ] && to=$2; [ "$1" = --requirement ] && from=$2; shift; done
mkdir -p "$to/flask/__pycache__" "$to/lib" && cp "$from" "$to/flask/__init__.py" && echo theirs >"$to/lib/own.py" && echo theirs >"$to/lib/their.py"
echo x >"$to/flask/__pycache__/x.pyc"
`)
	dir := folder(t, "main.py", "requirements.txt=# comment\n\nflask==3\n", "lib/own.py=mine")
	tree := open(t, dir)
	i := tree.Installer(codepack.Python)
	if i == nil || i.Program != "pip" || i.File != "requirements.txt" {
		t.Fatalf("installer %+v", i)
	}
	if err := i.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	host, client, _ := registryServer(t)
	ref, err := pack(t, tree).Push(t.Context(), client, host+"/code/x", counter())
	if err != nil {
		t.Fatal(err)
	}
	image, err := client.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	got := contents(t, client, image)
	if got["lib/own.py"] != "755 mine\n" || got["lib/their.py"] != "644 theirs\n" || !strings.Contains(got["flask/__init__.py"], "flask==3") || len(got) != 8 {
		t.Errorf("%q", got)
	}
	if left, _ := os.ReadDir(dir); len(left) != 3 {
		t.Errorf("the folder has %v", left)
	}
}

func TestInstallNode(t *testing.T) {
	tool(t, "npm", `
[ "$*" = "ci --omit=dev --no-audit --no-fund" ] && [ -f package.json ] && [ -f package-lock.json ] && [ -f .npmrc ] && [ ! -f index.js ] || exit 9
mkdir -p node_modules/.bin node_modules/left-pad node_modules/.cache && echo x >node_modules/left-pad/cli.js && ln -s ../left-pad/cli.js node_modules/.bin/left-pad
`)
	dir := folder(t, "index.js", "package.json={}", "package-lock.json={}", ".npmrc=token", codepack.IgnoreFile+"=node_modules\n.npmrc")
	tree := open(t, dir)
	if err := tree.Installer(codepack.Node).Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if tree.Files() != 3+5 { // node_modules, .bin, its link, left-pad, cli.js
		t.Errorf("%d files", tree.Files())
	}
	if folder(t, "node_modules/x") == "" || open(t, folder(t, "package-lock.json={}", "node_modules/x")).Installer(codepack.Node) != nil {
		t.Error("installs what is there")
	}
}

func TestInstallIsNotAskedFor(t *testing.T) {
	for name, tree := range map[string]*codepack.Tree{
		"nothing":      open(t, folder(t, "main.py")),
		"comments":     open(t, folder(t, "main.py", "requirements.txt=# flask")),
		"left out":     open(t, folder(t, "main.py", "requirements.txt=flask", codepack.IgnoreFile+"=requirements.txt")),
		"one file":     open(t, filepath.Join(folder(t, "main.py", "requirements.txt=flask"), "main.py")),
		"other places": open(t, folder(t, "main.py", "sub/requirements.txt=flask")),
	} {
		if i := tree.Installer(codepack.Python); i != nil {
			t.Errorf("%s: %+v", name, i)
		}
	}
}

func TestInstallErrors(t *testing.T) {
	python := []string{"main.py", "requirements.txt=nosuch"}
	for _, c := range []struct {
		want, tool, script string
		files              []string
	}{
		{"there is no pip here: install it", "other", "", python},
		{"exit status 3\n  ERROR: No matching distribution found for nosuch\nInstall what it names yourself (pip install --requirement", "pip", "echo 'ERROR: No matching distribution found for nosuch' >&2; exit 3", python},
		{`"lib" is a folder in one of`, "pip", `while [ $# -gt 1 ]; do shift; done; echo x >"$1/lib"`, append(python, "lib/x")},
		{`leads out of the code`, "pip", `while [ $# -gt 1 ]; do shift; done; ln -s /etc/passwd "$1/lib"`, python},
	} {
		tool(t, c.tool, c.script)
		if err := open(t, folder(t, c.files...)).Installer(codepack.Python).Install(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v, want %q", err, c.want)
		}
	}
}

// TestInstallIsInterrupted ends an installer with what it has started: they hold a pipe open, whose end is seen when all are gone.
func TestInstallIsInterrupted(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FIFO", fifo)
	tool(t, "pip", `exec 3>"$FIFO"; echo started >&3; mkfifo "$FIFO.never"; cat "$FIFO.never" & wait`)
	started, err := os.OpenFile(fifo, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	i := open(t, folder(t, "main.py", "requirements.txt=x")).Installer(codepack.Python)
	go func() {
		done <- i.Install(ctx)
		_ = started.Close() // so that nobody waits for what did not start
	}()
	if _, err := started.Read(make([]byte, len("started\n"))); err != nil {
		t.Fatal(<-done)
	}
	pipe, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if rest, err := io.ReadAll(pipe); err != nil || len(rest) > 0 {
		t.Errorf("%q, %v", rest, err)
	}
}
