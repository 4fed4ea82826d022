package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Handler writes the sample function of a Runtime into dir, as the code that a user deploys. A program in Go is compiled; nothing
// of its source is in dir.
func Handler(ctx context.Context, runtime, dir string) error {
	code, err := fs.Sub(functions, "functions/handlers/"+runtime)
	if err == nil {
		_, err = fs.ReadDir(code, ".")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no sample handler of runtime %s in bench/images/functions/handlers: %w", runtime, err)
	}
	if err != nil {
		return fmt.Errorf("sample handler of runtime %s: %w", runtime, err)
	}
	source, err := fs.ReadFile(code, "main.go")
	if errors.Is(err, fs.ErrNotExist) {
		err = os.CopyFS(dir, code)
	} else if err == nil {
		err = compileHandler(ctx, source, filepath.Join(dir, "main"))
	}
	if err != nil {
		return fmt.Errorf("sample handler of runtime %s: %w", runtime, err)
	}
	return nil
}

func compileHandler(ctx context.Context, source []byte, program string) error {
	work, err := os.MkdirTemp("", "hearth-handler-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	err = writeTree(work, map[string][]byte{"main.go": source, "go.mod": []byte("module handler\n\ngo 1.22\n")}, 0o644)
	if err != nil {
		return err
	}
	return compileGo(ctx, work, program)
}
