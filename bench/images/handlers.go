package images

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/hearth-serverless/hearth/runtimes"
)

// Handler returns the folder of the sample Function of a Runtime, as `hearth deploy` packs it, and the handler that it is called
// by. All of them answer with a greeting that they take a moment to work out as their users would: Python's with pandas.
func Handler(ctx context.Context, cfg Config, runtime string) (dir, handler string, err error) {
	handler, ok := map[string]string{"python": "main.hello", "node": "hello", "java": "Hello", "native": "main"}[runtime]
	if !ok {
		return "", "", fmt.Errorf("sample Function: there is no Runtime %q; there are %v", runtime, runtimes.Names())
	}
	sources := map[string][]byte{}
	root := path.Join("functions/handlers", runtime)
	err = fs.WalkDir(functions, root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		sources[strings.TrimPrefix(name, root+"/")], err = functions.ReadFile(name)
		return err
	})
	if err != nil {
		return "", "", err
	}
	dir, err = Code(ctx, cfg, runtime, sources)
	return dir, handler, err
}

// Code returns the folder of a Function's code for a Runtime, made of its sources by their path: compiled where the language
// wants it, with what the Runtime's image has. It is cached as images are (see Build); Java's takes what they take.
func Code(ctx context.Context, cfg Config, runtime string, sources map[string][]byte) (string, error) {
	r, ok := runtimeRecipe(runtime)
	if !ok {
		return "", fmt.Errorf("build code: there is no Runtime %q; there are %v", runtime, runtimes.Names())
	}
	b, err := newBuilder(cfg)
	if err != nil {
		return "", fmt.Errorf("build code: %w", err)
	}
	entry, err := b.cached(ctx, "code-"+runtime, key(r.key(), sources), func(dir string) error {
		work, err := os.MkdirTemp(dir, "work")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(work) }()
		code := filepath.Join(dir, "code")
		switch runtime {
		case "native":
			return compileNative(ctx, sources, work, filepath.Join(code, "main"))
		case "java":
			return b.compileJava(ctx, r, sources, work, code)
		}
		return writeTree(code, sources, 0o644)
	})
	if err != nil {
		return "", fmt.Errorf("build code for %s: %w", runtime, err)
	}
	return filepath.Join(entry, "code"), nil
}

// compileJava compiles classes in the tree that the java Runtime's own are compiled in, with its sources beside them.
func (b *builder) compileJava(ctx context.Context, r recipe, sources map[string][]byte, work, code string) error {
	_, root, err := b.base(ctx, nil)
	if err != nil {
		return err
	}
	_, packages, err := b.packagesOf(ctx, r.On, filepath.Join(work, "on"))
	if err != nil {
		return err
	}
	apt, err := aptOptions(ctx)
	if err != nil {
		return err
	}
	lower := []string{packages, root}
	compiler, err := b.compiler(ctx, r, lower, apt)
	if err != nil {
		return err
	}
	upper := filepath.Join(work, "compile")
	if err := writeTree(filepath.Join(upper, r.dir()), r.files(), 0o644); err != nil {
		return err
	}
	if err := writeTree(filepath.Join(upper, "workspace"), sources, 0o644); err != nil {
		return err
	}
	javac := []string{"sh", "-c", "javac -Xlint:all,-path -Werror -implicit:none -sourcepath " + hearthDir + " -d out $(find . -name '*.java')"}
	if err := overlay(ctx, upper, append([]string{compiler}, lower...), apt, nil, "/workspace", javac); err != nil {
		return err
	}
	return os.Rename(filepath.Join(upper, "workspace/out"), code)
}
