package codepack

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

const (
	// Workspace is where a Function finds its code.
	Workspace = "/workspace"

	maxSourceBytes  = 4 << 20 // of a source that is compiled
	maxSourcePath   = 1024    // so that the compiler, which has it below a folder, can open it
	maxCompiledName = 200
	otherVersion    = 3 // exit status of a compiler's program: its interpreter is another
)

//go:embed bytecode.py
var pythonCompiler string

// ErrNoCompiler says that there is nothing here that could compile for a Runtime.
var ErrNoCompiler = errors.New("no compiler")

// Compiler makes of sources what a language would otherwise make of them at each start, by the language's own interpreter. It runs none of
// the code. What it makes is as good as the sources that it comes with: it is of the same package.
type Compiler struct {
	// Sources counts what is compiled.
	Sources int
	// Version of the language that it is for, like "python 3.11".
	Version string

	tree       *Tree
	names      []string // of the sources
	candidates []string // programs
	args       []string // before the folders
}

// Compiler says what would be compiled for a language in the version that a Runtime's loader names, like "python 3.11.2": nothing (nil),
// if it has no use for that.
func (t *Tree) Compiler(language, version string) *Compiler {
	c := &Compiler{tree: t}
	switch language {
	case Python:
		parts := strings.Split(version, ".")
		if len(parts) < 2 {
			return nil
		}
		minor := parts[0] + "." + parts[1] // bytecode is the same in all versions of that
		c.Version, c.candidates = Python+" "+minor, []string{"python" + minor, "python3"}
		c.args = []string{"-S", "-s", "-B", "-W", "ignore", "-c", pythonCompiler, minor}
	default:
		return nil
	}
	c.names = t.sourcesOf(language)
	c.Sources = len(c.names)
	if c.Sources == 0 {
		return nil
	}
	return c
}

// Compiles says whether there is something to compile for a language, in whatever version.
func (t *Tree) Compiles(language string) bool { return len(t.sourcesOf(language)) > 0 }

// sourcesOf are the sources to compile, in the package's order. Libraries' tests are not: no start needs them.
func (t *Tree) sourcesOf(language string) (names []string) {
	for _, name := range t.names() {
		e := t.entries[name]
		if e.kind != 0 || e.size == 0 || e.size > maxSourceBytes || len(name) > maxSourcePath || len(path.Base(name)) > maxCompiledName {
			continue
		}
		if language == Python && path.Ext(name) == ".py" && !isTest(name) {
			names = append(names, name)
		}
	}
	return names
}

// isTest says whether a source is one of tests that a library brings along.
func isTest(name string) bool {
	folders := strings.Split(path.Dir(name), "/")
	return slices.ContainsFunc(folders[min(1, len(folders)):], func(f string) bool { return f == "tests" || f == "test" })
}

// Compile compiles and adds the outcome to the Tree, which has left out what the user may have of that kind. If it fails, the Tree is as
// good as before: what has to be compiled is compiled at each start. Errors: ErrNoCompiler.
func (c *Compiler) Compile(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "hearth-compile-")
	if err != nil {
		return err
	}
	c.tree.temps = append(c.tree.temps, dir)
	sources, output := filepath.Join(dir, "sources"), filepath.Join(dir, "output")
	if err := errors.Join(os.Mkdir(sources, 0o700), os.Mkdir(output, 0o700)); err != nil {
		return err
	}
	if err := c.stage(ctx, sources); err != nil {
		return err
	}
	if err := c.run(ctx, dir, sources, output); err != nil {
		return err
	}
	return c.adopt(output)
}

// stage copies the sources. The package gets the copies: what was compiled is what it has, whatever becomes of the user's files.
func (c *Compiler) stage(ctx context.Context, dir string) error {
	to, err := c.tree.source(dir, "what was compiled")
	if err != nil {
		return err
	}
	var read atomic.Int64
	for _, name := range c.names {
		if err := to.root.MkdirAll(path.Dir(name), 0o700); err != nil {
			return err
		}
		f, err := to.root.Create(name)
		if err != nil {
			return err
		}
		e := c.tree.entries[name]
		if err := errors.Join(e.copyTo(ctx, f, &read), f.Close()); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		e.from, e.name = to, name
		c.tree.entries[name] = e
	}
	return nil
}

// run has the first candidate compile whose version is right.
func (c *Compiler) run(ctx context.Context, work, sources, output string) error {
	for _, candidate := range c.candidates {
		program, err := exec.LookPath(candidate)
		if err != nil {
			continue
		}
		err = c.runAll(ctx, program, work, sources, output)
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && (exit.ExitCode() == otherVersion || exit.ExitCode() == notFound) {
			continue
		}
		return err
	}
	return fmt.Errorf("%w: there is no %s here", ErrNoCompiler, c.Version)
}

// notFound is the exit status of a shell that stands for a program and does not find it, as those of version managers.
const notFound = 127

// runAll compiles with all cores. What is made of a file does not depend on what else its process compiles.
func (c *Compiler) runAll(ctx context.Context, program, work, sources, output string) error {
	group, ctx := errgroup.WithContext(ctx)
	workers := max(1, min(runtime.GOMAXPROCS(0), c.Sources/8)) // each has to boot
	for n := range workers {
		args := append(slices.Clone(c.args), sources, output, Workspace, strconv.Itoa(n), strconv.Itoa(workers))
		group.Go(func() error { return run(ctx, program, args, work, compilerEnv()) })
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("%s: %w", path.Base(program), err)
	}
	return nil
}

// compilerEnv is the user's environment without what changes how an interpreter works.
func compilerEnv() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PYTHON") || strings.HasPrefix(v, "NODE_") })
	return append(env, "PYTHONHASHSEED=0") // sets are compiled in the order of their hashes
}

// adopt adds what was compiled, unless it makes the package too large.
func (c *Compiler) adopt(dir string) error {
	from, err := c.tree.source(dir, "what was compiled")
	if err != nil {
		return err
	}
	var names []string
	bytes := c.tree.bytes
	err = fs.WalkDir(from.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		names = append(names, name)
		if d.Type().IsRegular() {
			bytes += info.Size()
		}
		return nil
	})
	if err != nil {
		return err
	}
	if limits := c.tree.limits; bytes > limits.MaxBytes || len(c.tree.entries)+len(names) > limits.MaxFiles {
		return fmt.Errorf("the package would have more than %d MiB or %d files", limits.MaxBytes>>20, limits.MaxFiles)
	}
	for _, name := range names {
		if err := c.tree.add(name, name, from); err != nil {
			return err
		}
	}
	return nil
}
