package images

import (
	"context"
	"fmt"
	"os/exec"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// Program is what an image starts.
type Program struct {
	Args, Env []string
	Dir       string
}

// Unpack writes the tree of a layout's image below dir, so that its program can be started without any container, and returns
// that program.
func Unpack(ctx context.Context, layoutPath, dir string) (Program, error) {
	image, err := open(layoutPath)
	if err != nil {
		return Program{}, err
	}
	flat := mutate.Extract(image)
	defer flat.Close()
	tar := exec.CommandContext(ctx, "tar", "-xpC", dir)
	tar.Stdin = flat
	if out, err := tar.CombinedOutput(); err != nil {
		return Program{}, fmt.Errorf("unpack %s: %w: %s", layoutPath, err, out)
	}
	file, err := image.ConfigFile()
	if err != nil {
		return Program{}, fmt.Errorf("read the configuration of %s: %w", layoutPath, err)
	}
	c := file.Config
	return Program{Args: append(append([]string{}, c.Entrypoint...), c.Cmd...), Env: c.Env, Dir: c.WorkingDir}, nil
}
