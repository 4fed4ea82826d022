package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"
)

// static compiles the recipe's Go source into the one file of the one layer of an image from scratch.
func (b *builder) static(ctx context.Context, name string, r recipe, dir string) ([]*blob, error) {
	work := filepath.Join(dir, "work")
	defer func() { _ = os.RemoveAll(work) }()
	source, tree := filepath.Join(work, "source"), filepath.Join(work, "tree")
	err := writeTree(source, map[string][]byte{
		"main.go": r.Source,
		"go.mod":  []byte("module " + r.File + "\n\ngo 1.22\n"),
	}, 0o644)
	if err != nil {
		return nil, err
	}
	var layer *blob
	err = b.step(name, "compile "+r.File, func() error {
		program := filepath.Join(work, r.File)
		if err := compileGo(ctx, source, program); err != nil {
			return err
		}
		text, err := os.ReadFile(program)
		if err != nil {
			return err
		}
		if err := writeTree(tree, map[string][]byte{r.File: text}, 0o755); err != nil {
			return err
		}
		layer, err = pack(ctx, tree, nil, filepath.Join(dir, r.File+".tar.gz"))
		return err
	})
	return []*blob{layer}, err
}

// compileGo makes a static program of the module in source, which uses nothing but the standard library. The same
// source and toolchain give the same bytes.
func compileGo(ctx context.Context, source, program string) error {
	command := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w -buildid=", "-o", program, ".")
	command.Dir = source
	command.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+runtime.GOARCH, "CGO_ENABLED=0",
		"GOWORK=off", "GOFLAGS=-buildvcs=false", "GOTOOLCHAIN=local")
	output, err := command.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return errors.New("go is not on the PATH: this image is compiled from source; install it from https://go.dev/dl")
	}
	if err != nil {
		return fmt.Errorf("%w; it said:\n%s", err, output)
	}
	return nil
}

// writeTree creates dir with the named files in it and below. Their times are always the same, and so is then the layer's digest.
func writeTree(dir string, files map[string][]byte, mode os.FileMode) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	fixed := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, text, mode); err != nil {
			return err
		}
	}
	return filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, fixed, fixed)
	})
}
