package codepack_test

import (
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/internal/codepack"
)

// ignoreTree is what patterns are tried on.
var ignoreTree = []string{
	"a", "b.pyc", "c.txt", "#hash", "!bang", "back\\slash", "blank ", "with space", "[x]", "x", "dash-", "]", "^", "A1",
	"build/out.o", "build/keep/out.o", "build/keep/deep/out.o", "src/build/out.o", "src/main.py", "src/main.pyc", "src/test/a", "src/test/test/a",
	"docs/a/b/c/file", "docs/file", "docs/a/file", "foo/bar/baz", "foo/x/bar/baz", "foobar", "log/debug.log", "log/debug1.log", "log/debug10.log",
	"abc/def/ghi", "abc/x", "d/abc/x", "file", "deep/er/than/this/file", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
}

var ignorePatterns = []string{
	"*.pyc", "/a", "a", "a/", "build", "build/", "/build/", "build/*", "build/*\n!build/keep", "build\n!build/keep", "*\n!*.txt", "*\n!*/\n!*.py", "**", "/**", "*/", "**/",
	"**/build", "**/build/out.o", "build/**", "build/**/out.o", "docs/**/file", "docs/*/file", "foo/**/baz", "foo/**/bar/baz", "foo/**bar/baz", "foo**", "foo/**/**/baz",
	"\\#hash", "#hash", "\\!bang", "!bang", "back\\\\slash", "blank ", "blank\\ ", "blank\\  ", "with space", "with?space", "\\[x\\]", "[x]", "[[]x]", "[]]", "[]x]", "[^x]", "[!x]", "[",
	"[a-c]*", "[c-a]*", "[a-]", "[-a]", "dash[-]", "[]-a]", "[!-a]", "[a/b]", "docs[/]file", "docs\\/file", "\\", "a\\", "[\\]]", "[\\^]", "[^^]", "[[:upper:]]*", "[[:digit:]a]*", "[[:nope:]]*", "[[:alpha:]][[:digit:]]",
	"log/debug[0-9].log", "log/debug?.log", "log/debug??.log", "log/*.log\n!log/debug1.log", "?.txt", "??.txt", "*a*a*a*a*a*b", "*a*a*a*a*", "a*a", "src/test", "/src/test", "test/", "src/test/", "test/a",
	"abc/**", "**/abc/**", "abc", "/abc/x", "abc/x", "", "   ", "/", "!", "!a", "//a", "a//", "\ufeffa", "a\r\nfile\r\n", "file\n\n\n# comment\n  x", "*.o\n!out.o\nbuild/keep/deep", "/*\n!/src\n/src/*\n!/src/main.py", "***", "a***", "***/file", "docs/***/file", "*/*/file", "*/file", "deep/**/this/*",
}

// TestIgnoreIsGits packs what git would add.
func TestIgnoreIsGits(t *testing.T) {
	git, err := exec.LookPath("git")
	if err != nil {
		t.Fatal("git is needed to compare with: ", err)
	}
	dir := t.TempDir()
	for _, name := range ignoreTree {
		write(t, dir, name, "x", 0o644)
	}
	run := func(args ...string) string {
		cmd := exec.Command(git, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "HOME="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("git %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	run("init", "--quiet")
	for _, patterns := range ignorePatterns {
		file := filepath.Join(dir, ".git", "patterns")
		if err := os.WriteFile(file, []byte(patterns), 0o600); err != nil {
			t.Fatal(err)
		}
		want := strings.Split(strings.TrimSuffix(run("ls-files", "--others", "-z", "--exclude-from="+file), "\x00"), "\x00")
		if want[0] == "" {
			want = nil
		}
		slices.Sort(want)
		if diff := cmp.Diff(want, kept(t, patterns, ignoreTree)); diff != "" {
			t.Errorf("%q: -git +ours\n%s", patterns, diff)
		}
	}
}

// kept are the files that patterns leave, with the folders on the way asked about as a walk asks.
func kept(t testing.TB, patterns string, files []string) (left []string) {
	t.Helper()
	leavesOut, err := codepack.Ignore(strings.NewReader(patterns))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		out := leavesOut(file, false)
		for dir := path.Dir(file); dir != "."; dir = path.Dir(dir) {
			out = out || leavesOut(dir, true)
		}
		if !out {
			left = append(left, file)
		}
	}
	slices.Sort(left)
	return left
}

func TestIgnoreKnowsCharacters(t *testing.T) {
	if left := kept(t, "?.txt\n[à-ü]", []string{"ä.txt", "ö", "n"}); len(left) != 1 || left[0] != "n" {
		t.Errorf("keeps %q", left)
	}
}

func TestAlwaysLeftOut(t *testing.T) {
	files := []string{".git/HEAD", "sub/.git", "__pycache__/x.pyc", "a/b/__pycache__/y", "node_modules/.cache/z", "web/node_modules/.cache/z", ".cache/kept", "node_modules/kept", ".gitignore", codepack.IgnoreFile, "sub/" + codepack.IgnoreFile}
	want := []string{".cache/kept", ".gitignore", "node_modules/kept", "sub/" + codepack.IgnoreFile}
	if diff := cmp.Diff(want, kept(t, "!.git\n!__pycache__\n!**/.cache\n!"+codepack.IgnoreFile, files)); diff != "" {
		t.Error(diff)
	}
}

func TestIgnoreIsBounded(t *testing.T) {
	for want, text := range map[string]string{
		"line 2: more than":  "a\n" + strings.Repeat("b", 5000),
		"more than 4096 lin": strings.Repeat("a\n", 5000),
		"more than 1048576 ": strings.Repeat("#\n", 600_000),
		"line 1: not UTF-8":  "\xff",
	} {
		if _, err := codepack.Ignore(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

// FuzzIgnore has patterns decide on any path. What the last line says of a path that it names literally holds, whatever is before.
func FuzzIgnore(f *testing.F) {
	for i, p := range ignorePatterns {
		f.Add(p, ignoreTree[i%len(ignoreTree)])
	}
	f.Add("**/a/**/b/**/*[!x]*?", "a/a/b/a/b/c")
	f.Fuzz(func(t *testing.T, patterns, name string) {
		if !validPath(name) {
			t.Skip()
		}
		leavesOut, err := codepack.Ignore(strings.NewReader(patterns))
		if err != nil {
			return
		}
		file, folder := leavesOut(name, false), leavesOut(name, true)
		if file && !folder && !strings.Contains(patterns, "!") {
			t.Errorf("%q leaves out the file %q and not the folder", patterns, name)
		}
		if again, _ := codepack.Ignore(strings.NewReader(patterns + "\n")); again != nil && again(name, false) != file {
			t.Errorf("%q: a line end changes what becomes of %q", patterns, name)
		}
		literal := fmt.Sprintf("%s\n/%s", patterns, quoteGlob(name))
		if out, err := codepack.Ignore(strings.NewReader(literal)); err == nil && !out(name, false) {
			t.Errorf("%q does not leave out %q", literal, name)
		}
	})
}

func validPath(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return !strings.ContainsAny(name, "\x00\n\r") && strings.ToValidUTF8(name, "") == name
}

// quoteGlob makes a pattern of a name.
func quoteGlob(name string) string {
	var b strings.Builder
	for _, r := range name {
		if strings.ContainsRune(`\*?[]!# `, r) {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return b.String()
}
