package images

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/partial"

	"github.com/hearth-serverless/hearth/runtimes"
)

// runtimeRecipe is that of the image which boots a Runtime. It shares base and packages with the language's sample image.
func runtimeRecipe(name string) (recipe, bool) {
	loader, ok := runtimes.Loader(name)
	if !ok {
		return recipe{}, false
	}
	r := recipe{Runtime: name, On: name, Loader: loader}
	switch name {
	case "python":
		r.Packages = []string{"python3-requests"}
	case "node":
		r.Packages = []string{"node-express"}
	case "java":
		r.Compiler = []string{"openjdk-17-jdk-headless", "gcc", "libc6-dev"}
		r.Compile, r.Output = []string{"sh", "build.sh"}, "out/*"
	case "native": // on the base alone: its C library is for those whose program is not static
		r.On, r.Packages = "", []string{"ca-certificates"}
	}
	return r, true
}

// runtimeEntrypoint is how a Runtime's loader is started; none for what is no Runtime.
func runtimeEntrypoint(name string) []string {
	return map[string][]string{
		"python": {"python3", "-B", hearthDir + "/loader.py"},
		// Node cannot move a descriptor away from 0; a shell can, and is gone at once.
		"node":   {"/bin/sh", "-c", "exec node " + hearthDir + "/loader.js 3<&0 </dev/null"},
		"java":   {"java", "@" + hearthDir + "/java.options", "-jar", hearthDir + "/loader.jar"},
		"native": {hearthDir + "/loader"},
	}[name]
}

// compileNative makes a static program of Go sources, in folders that it makes in work.
func compileNative(ctx context.Context, sources map[string][]byte, work, program string) error {
	source, compiled := filepath.Join(work, "source"), filepath.Join(work, "compiled")
	files := map[string][]byte{"go.mod": []byte("module function\n\ngo 1.22\n")}
	maps.Copy(files, sources)
	if err := writeTree(source, files, 0o644); err != nil {
		return err
	}
	if err := compileGo(ctx, source, compiled); err != nil {
		return err
	}
	text, err := os.ReadFile(compiled)
	if err != nil {
		return err
	}
	return writeTree(filepath.Dir(program), map[string][]byte{filepath.Base(program): text}, 0o755)
}

// layoutLayer returns a layer of a layout's image, the lowest being 0, as the file that the layout has it in.
func layoutLayer(layoutPath string, index int) (*blob, error) {
	image, err := open(layoutPath)
	if err != nil {
		return nil, err
	}
	layers, err := image.Layers()
	if err != nil {
		return nil, err
	}
	if index >= len(layers) {
		return nil, fmt.Errorf("there is no layer %d", index)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	descriptor, err := partial.Descriptor(layers[index])
	if err != nil {
		return nil, err
	}
	return &blob{
		Dgst: descriptor.Digest, Diff: config.RootFS.DiffIDs[index], Bytes: descriptor.Size, media: descriptor.MediaType,
		path: filepath.Join(layoutPath, "blobs", descriptor.Digest.Algorithm, descriptor.Digest.Hex), shared: true,
	}, nil
}

// unpackLayer writes the tree of a layer that only adds to what is below it into dir, as a lower tree of overlays.
func unpackLayer(ctx context.Context, file, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	list, err := exec.CommandContext(ctx, "tar", "-tzf", file).Output()
	if err != nil {
		return fmt.Errorf("list %s: %w", file, err)
	}
	if strings.Contains(string(list), "/"+whiteoutPrefix) {
		return errors.New("it deletes files of the layer below, and no image can be built on such a one")
	}
	if text, err := exec.CommandContext(ctx, "tar", "--xattrs", "-xpzf", file, "-C", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("unpack %s: %w: %s", file, err, text)
	}
	return nil
}
