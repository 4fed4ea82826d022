package images

import (
	"cmp"
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

// debian builds base, packages and function as three layers; an image on another has its packages' layer too. dir is the image's folder under way; what is only needed
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

	layers, lower := []*blob{lowest}, []string{root} // trees topmost first, as overlays want them
	if r.On != "" {
		shared, tree, err := b.packagesOf(ctx, r.On, filepath.Join(work, "on"))
		if err != nil {
			return nil, err
		}
		layers, lower = append(layers, shared), append([]string{tree}, lower...)
	}
	below := lower
	if len(r.Packages) > 0 {
		packages := filepath.Join(work, "packages")
		err = b.step(name, "install "+strings.Join(r.Packages, ", "), func() error {
			return overlay(ctx, packages, lower, apt, r.Packages, r.dir(), nil)
		})
		if err != nil {
			return nil, err
		}
		lower = append([]string{packages}, lower...)
	}
	function := filepath.Join(work, "function")
	if err := b.function(ctx, name, r, function, lower, apt); err != nil {
		return nil, err
	}
	trees := []string{function}
	if len(r.Packages) > 0 {
		trees = []string{lower[0], function}
	}
	err = b.step(name, "pack layers", func() error {
		for _, tree := range trees {
			layer, err := pack(ctx, tree, below, filepath.Join(dir, filepath.Base(tree)+".tar.gz"))
			if err != nil {
				return err
			}
			layers = append(layers, layer)
		}
		return nil
	})
	return layers, err
}

// compiler returns the tree of what a recipe's compiler adds to those of lower; it is a cache entry of its own.
func (b *builder) compiler(ctx context.Context, r recipe, lower, apt []string) (string, error) {
	const tree = "tree"
	on, _ := recipeOf(r.On)
	name := "compiler-" + r.On
	entry, err := b.cached(ctx, name, key(on.key(), r.Compiler), func(dir string) error {
		work, err := os.MkdirTemp(dir, "work")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(work) }()
		upper := filepath.Join(work, tree)
		err = b.step(name, "install "+strings.Join(r.Compiler, ", "), func() error {
			return overlay(ctx, upper, lower, apt, r.Compiler, "/", nil)
		})
		if err != nil {
			return err
		}
		return os.Rename(upper, filepath.Join(dir, tree))
	})
	if err != nil {
		return "", err
	}
	return filepath.Join(entry, tree), nil
}

// packagesOf returns the layer of packages of an image, which it builds if need be, and the layer's tree in dir.
func (b *builder) packagesOf(ctx context.Context, name, dir string) (*blob, string, error) {
	r, ok := recipeOf(name)
	if !ok {
		return nil, "", fmt.Errorf("it lies on %s, which does not exist", name)
	}
	path, err := b.image(ctx, name, r)
	if err != nil {
		return nil, "", err
	}
	layer, err := layoutLayer(path, 1)
	if err != nil {
		return nil, "", fmt.Errorf("packages of %s: %w", name, err)
	}
	return layer, dir, b.step(name, "unpack its packages", func() error { return unpackLayer(ctx, layer.path, dir) })
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
	if r.Runtime == "native" {
		return b.step(name, "compile its loader", func() error {
			return compileNative(ctx, r.Loader, filepath.Dir(dir), filepath.Join(dir, r.dir(), "loader"))
		})
	}
	if len(r.Compile) == 0 {
		return writeTree(filepath.Join(dir, r.dir()), r.files(), 0o644)
	}
	compiled := filepath.Join(filepath.Dir(dir), "compile")
	if err := writeTree(filepath.Join(compiled, r.dir()), r.files(), 0o644); err != nil {
		return err
	}
	compiler := r.Compiler
	if r.On != "" { // more is compiled upon that image: the compiler is kept
		tree, err := b.compiler(ctx, r, lower, apt)
		if err != nil {
			return err
		}
		lower, compiler = append([]string{tree}, lower...), nil
	}
	err := b.step(name, "compile "+cmp.Or(r.File, "its loader"), func() error {
		return overlay(ctx, compiled, lower, apt, compiler, r.dir(), r.Compile)
	})
	if err != nil {
		return err
	}
	files := map[string][]byte{}
	paths, err := filepath.Glob(filepath.Join(compiled, r.dir(), r.Output))
	if err != nil {
		return err
	}
	for _, path := range paths {
		if files[filepath.Base(path)], err = os.ReadFile(path); err != nil {
			return err
		}
	}
	if len(files) == 0 {
		return fmt.Errorf("compile %s: it left no %s", cmp.Or(r.File, "its loader"), r.Output)
	}
	return writeTree(filepath.Join(dir, r.dir()), files, 0o644)
}

// overlay mounts an overlay of lower, topmost first, with upper as the folder that takes the changes, installs packages
// in it and then runs command there, in workdir.
func overlay(ctx context.Context, upper string, lower, apt, packages []string, workdir string, command []string) error {
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
		strings.Join(packages, " "), workdir}, command...)...)
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
