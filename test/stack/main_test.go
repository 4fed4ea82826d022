package stack_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// workshop is what all tests share and none changes: programs and images, made once.
type workshop struct {
	tools, bin, pause string
	golang, native    string // OCI layouts of the sample image "go" and of the native Runtime
	probe, tenant     string // the programs of testdata
}

// shop is set before the first test runs. Without root there is none, and every test skips.
var shop *workshop

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 { // the one probe: as root nothing skips
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "hearth-stack-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if shop, err = build(context.Background(), dir); err != nil {
		fmt.Fprintln(os.Stderr, "test/stack:", err)
		return 1
	}
	return m.Run()
}

// build compiles the daemons, the launcher and the programs of testdata, and makes the images.
func build(ctx context.Context, dir string) (*workshop, error) {
	top, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		return nil, err
	}
	cache := os.Getenv("HEARTH_CACHE")
	if cache == "" {
		cache = filepath.Join(top, ".cache")
	}
	w := &workshop{tools: os.Getenv("HEARTH_TOOLS"), bin: dir, pause: filepath.Join(dir, "pause.tar"), probe: filepath.Join(dir, "probe"), tenant: filepath.Join(dir, "tenant")}
	if w.tools == "" {
		w.tools = filepath.Join(cache, "tools", "current")
	}
	if w.tools, err = filepath.Abs(w.tools); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(w.tools, "containerd")); err != nil {
		return nil, fmt.Errorf("%w: run `make tools`, or name their folder in HEARTH_TOOLS", err)
	}
	programs := []string{"./runtimes/launcher"}
	for _, name := range []string{"nodeagent", "logwriter", "poolmanager", "gateway", "sidecar", "hearth"} {
		programs = append(programs, "./cmd/"+name)
	}
	if err := compile(ctx, top, append([]string{"-o", dir + "/"}, programs...)...); err != nil {
		return nil, err
	}
	for _, program := range []string{w.probe, w.tenant} {
		if err := compile(ctx, top, "-o", program, "./test/stack/testdata/"+filepath.Base(program)+"/main.go"); err != nil {
			return nil, err
		}
	}
	config := images.Config{Cache: cache}
	if w.golang, err = images.Build(ctx, config, "go"); err != nil {
		return nil, err
	}
	if w.native, err = images.Build(ctx, config, "runtime-native"); err != nil {
		return nil, err
	}
	return w, w.exportPause(ctx, config)
}

func compile(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"build"}, args...)...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return nil
}

func (w *workshop) exportPause(ctx context.Context, config images.Config) error {
	layout, err := images.Build(ctx, config, "pause")
	if err != nil {
		return err
	}
	f, err := os.Create(w.pause)
	if err != nil {
		return err
	}
	return errors.Join(images.ExportTar(layout, stack.PauseRef, f), f.Close())
}
