package images

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// baseRecipe says what lies below all images of Debian packages.
type baseRecipe struct{ Suite, Variant string }

// base returns what is the same for all, so that they share its layer.
func base() baseRecipe { return baseRecipe{Suite: "bookworm", Variant: "minbase"} }

//go:embed base.sh
var baseScript string

//go:embed layer.sh
var layerScript string

// debian builds base, packages and function as three layers. dir is the image's folder under way; what is only needed
// while building goes to its subfolder work, and is gone afterwards.
func (b *builder) debian(ctx context.Context, name string, r recipe, dir string) ([]*blob, error) {
	apt, err := aptOptions(ctx)
	if err != nil {
		return nil, err
	}
	lowest, root, err := b.base(ctx, apt)
	if err != nil {
		return nil, err
	}
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(work) }()

	packages := filepath.Join(work, "packages")
	err = b.step(name, "install "+strings.Join(r.Packages, ", "), func() error {
		return overlay(ctx, packages, []string{root}, apt, r.Packages, nil)
	})
	if err != nil {
		return nil, err
	}
	function := filepath.Join(work, "function")
	if err := b.function(ctx, name, r, function, []string{packages, root}, apt); err != nil {
		return nil, err
	}
	layers := []*blob{lowest}
	err = b.step(name, "pack layers", func() error {
		for _, tree := range []string{packages, function} {
			layer, err := pack(ctx, tree, []string{root}, filepath.Join(dir, filepath.Base(tree)+".tar.gz"))
			if err != nil {
				return err
			}
			layers = append(layers, layer)
		}
		return nil
	})
	return layers, err
}

// base returns the common base as a layer and as a tree to mount overlays on; it is a cache entry of its own.
func (b *builder) base(ctx context.Context, apt []string) (*blob, string, error) {
	const packed, described, tree = "layer.tar.gz", "layer.json", "rootfs"
	recipe := base()
	entry, err := b.cached(ctx, "base", key(recipe), func(dir string) error {
		root := filepath.Join(dir, tree)
		sources, err := debianSources(os.DirFS("/etc/apt"), recipe.Suite)
		if err != nil {
			return err
		}
		err = b.step("base", "make a minimal Debian "+recipe.Suite, func() error {
			args := []string{root, recipe.Variant, recipe.Suite, sources}
			for _, option := range apt {
				args = append(args, "--aptopt="+option)
			}
			return sandbox(ctx, dir, baseScript, args...)
		})
		if err != nil {
			return err
		}
		return b.step("base", "pack layer", func() error {
			layer, err := pack(ctx, root, nil, filepath.Join(dir, packed))
			if err != nil {
				return err
			}
			text, err := json.Marshal(layer)
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, described), text, 0o644)
		})
	})
	if err != nil {
		return nil, "", fmt.Errorf("common base: %w", err)
	}
	text, err := os.ReadFile(filepath.Join(entry, described))
	if err != nil {
		return nil, "", err
	}
	layer := &blob{}
	if err := json.Unmarshal(text, layer); err != nil {
		return nil, "", fmt.Errorf("read %s: %w", filepath.Join(entry, described), err)
	}
	layer.path, layer.shared = filepath.Join(entry, packed), true
	return layer, filepath.Join(entry, tree), nil
}

// function fills dir with the tree of the topmost layer, compiling the source first where the recipe says so.
func (b *builder) function(ctx context.Context, name string, r recipe, dir string, lower, apt []string) error {
	if len(r.Compile) == 0 {
		return writeTree(filepath.Join(dir, appDir), map[string][]byte{r.File: r.Source}, 0o644)
	}
	compiled := filepath.Join(filepath.Dir(dir), "compile")
	if err := writeTree(filepath.Join(compiled, appDir), map[string][]byte{r.File: r.Source}, 0o644); err != nil {
		return err
	}
	err := b.step(name, "compile "+r.File, func() error {
		return overlay(ctx, compiled, lower, apt, r.Compiler, r.Compile)
	})
	if err != nil {
		return err
	}
	files := map[string][]byte{}
	paths, err := filepath.Glob(filepath.Join(compiled, appDir, r.Output))
	if err != nil {
		return err
	}
	for _, path := range paths {
		if files[filepath.Base(path)], err = os.ReadFile(path); err != nil {
			return err
		}
	}
	if len(files) == 0 {
		return fmt.Errorf("compile %s: it left no %s", r.File, r.Output)
	}
	return writeTree(filepath.Join(dir, appDir), files, 0o644)
}

// overlay mounts an overlay of lower, topmost first, with upper as the folder that takes the changes, installs packages
// in it and then runs command there, in appDir.
func overlay(ctx context.Context, upper string, lower, apt, packages, command []string) error {
	dir := filepath.Dir(upper)
	for _, path := range []string{upper, filepath.Join(dir, "overlay"), filepath.Join(dir, "merged")} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
	}
	// Relative paths, because a colon or a comma in the cache's own path would end an entry of the mount's options.
	relative := make([]string, len(lower))
	for i, path := range lower {
		var err error
		if relative[i], err = filepath.Rel(dir, path); err != nil {
			return err
		}
	}
	var options strings.Builder
	for _, option := range apt {
		options.WriteString(option + ";\n")
	}
	return sandbox(ctx, dir, layerScript, append([]string{strings.Join(relative, ":"), filepath.Base(upper), options.String(),
		strings.Join(packages, " "), appDir}, command...)...)
}

// aptOptions returns, as lines of apt.conf without their semicolon, those of the machine's own settings without which
// its mirror might not be usable, and what keeps images small.
func aptOptions(ctx context.Context) ([]string, error) {
	options := []string{`Acquire::Languages "none"`, `Acquire::Retries "3"`}
	dump, err := exec.CommandContext(ctx, "apt-config", "dump", "--format", "%f \"%v\"%n", "--no-empty", "Acquire").Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, errors.New("apt is missing: this image is made of Debian packages; run it on Debian or Ubuntu, after tools/build")
	}
	if err != nil {
		return nil, fmt.Errorf("read apt's settings: %w", err)
	}
	for line := range strings.Lines(string(dump)) {
		line = strings.TrimSpace(line)
		name, _, _ := strings.Cut(line, " ")
		if strings.Contains(name, "::Proxy") || strings.Contains(name, "::Check-") {
			options = append(options, line)
		}
	}
	return options, nil
}
