// Package release makes the images of Hearth's own daemons from their programs, and brings them to a registry. No container engine
// is needed: an image is a few static programs in one layer, packed by package codepack, so that the same programs are the same
// digests on any machine and day, and a registry is sent only what it does not have.
package release

import (
	"context"
	"debug/elf"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hearth-serverless/hearth/internal/codepack"
	"github.com/hearth-serverless/hearth/registry"
)

// Nobody is the user of what needs no privilege. It has a number, so that a kubelet can see that it is not root.
const Nobody = "65532:65532"

// programs is where an image has them: nodeagent looks for the others beside itself.
const programs = "usr/local/bin"

// maxProgramBytes keeps what is no program of ours from being sent to a registry.
const maxProgramBytes = 256 << 20

// contents says which programs an image has, the one that is executed first.
type contents struct {
	name, title, user string
	programs          []string
}

var images = []contents{
	{"hearth/nodeagent", "Hearth's agent on each node", "0:0", []string{"nodeagent", "launcher", "logwriter", "sidecar"}},
	{"hearth/poolmanager", "Hearth's owner of claims, pools and functions", Nobody, []string{"poolmanager"}},
	{"hearth/gateway", "Hearth's front door", Nobody, []string{"gateway"}},
	{"hearth/pause", "holds the pod of a Hearth Instance", Nobody, []string{"pause"}},
}

// Names of the images, without a registry.
func Names() []string {
	var names []string
	for _, i := range images {
		names = append(names, i.name)
	}
	return names
}

// Images are Hearth's, packed, in the order of Names. Close them.
type Images []Image

// Image is one of them.
type Image struct {
	Name string // hearth/NAME
	*codepack.Package
}

// Close removes what Build has left for Push.
func (images Images) Close() {
	for _, i := range images {
		i.Package.Close()
	}
}

// Build packs the programs of binDir, where `make build` puts them. All of them have to be there, static, and for one architecture,
// which becomes the images'.
func Build(ctx context.Context, binDir string) (_ Images, err error) {
	var built Images
	defer func() {
		if err != nil {
			built.Close()
		}
	}()
	arch, err := commonArchitecture(binDir)
	if err != nil {
		return nil, err
	}
	for _, c := range images {
		p, err := c.build(ctx, binDir, arch)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", c.name, err)
		}
		built = append(built, Image{c.name, p})
	}
	return built, nil
}

func commonArchitecture(binDir string) (string, error) {
	found, of := "", ""
	for _, c := range images {
		for _, p := range c.programs {
			arch, err := architecture(filepath.Join(binDir, p))
			switch {
			case err != nil:
				return "", fmt.Errorf("image %s: %w; `make build` makes it", c.name, err)
			case found != "" && arch != found:
				return "", fmt.Errorf("image %s: %s in %s is for %s, and %s is for %s: build all of them for one", c.name, p, binDir, arch, of, found)
			}
			found, of = arch, p
		}
	}
	return found, nil
}

func (c contents) build(ctx context.Context, binDir, arch string) (*codepack.Package, error) {
	files := map[string]string{}
	for _, p := range c.programs {
		files[path.Join(programs, p)] = p
	}
	tree, err := codepack.Select(binDir, files, codepack.Limits{MaxBytes: maxProgramBytes})
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	return tree.PackImage(ctx, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		Config: ocispec.ImageConfig{
			User: c.user, Entrypoint: []string{"/" + path.Join(programs, c.programs[0])}, WorkingDir: "/",
			Env:    []string{"PATH=/" + programs}, // without it a runtime would make one up
			Labels: map[string]string{ocispec.AnnotationTitle: c.title},
		},
	})
}

// architectures that Hearth runs on, by what ELF calls them.
var architectures = map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64"}

// architecture says for which machine a program is. An image has nothing but programs, so those that want a loader or libraries
// are refused.
func architecture(name string) (string, error) {
	info, err := os.Lstat(name)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no file (%s)", name, info.Mode().Type())
	}
	file, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer file.Close()
	f, err := elf.NewFile(file)
	if err != nil {
		return "", fmt.Errorf("%s is no program for Linux: %w", name, err)
	}
	arch := architectures[f.Machine]
	needs := slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
	switch {
	case arch == "" || f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN:
		return "", fmt.Errorf("%s is no program that Hearth's images can have (%s, %s)", name, f.Type, f.Machine)
	case needs:
		return "", fmt.Errorf("%s is not static, and an image has no libraries: build it with CGO_ENABLED=0", name)
	}
	return arch, nil
}

// tagged is what a registry takes as a tag.
var tagged = regexp.MustCompile(`^\w[\w.-]{0,127}$`)

// Push stores the images in a registry, as PREFIX/hearth/NAME; the prefix is HOST[:PORT], with or without a path below it, and
// credentials and hosts that speak plain HTTP are the client's matter. Each gets the version as a tag besides. It returns what a
// cluster is told instead: references by digest, by the names of Names.
func (images Images) Push(ctx context.Context, c *registry.Client, prefix, version string) (map[string]string, error) {
	if !tagged.MatchString(version) {
		return nil, fmt.Errorf("push images: version %q is no tag: letters, digits, dots and dashes, 128 at most", version)
	}
	refs := map[string]string{}
	for _, i := range images {
		repository := strings.TrimSuffix(prefix, "/") + "/" + i.Name
		ref, err := i.Package.Push(ctx, c, repository, &atomic.Int64{})
		if err == nil {
			err = i.Tag(ctx, c, repository, version)
		}
		if err != nil {
			return nil, fmt.Errorf("push image %s: %w", i.Name, err)
		}
		refs[i.Name] = ref
	}
	return refs, nil
}

// Digests of the images by name.
func (images Images) Digests() map[string]digest.Digest {
	out := map[string]digest.Digest{}
	for _, i := range images {
		out[i.Name] = i.Digest()
	}
	return out
}
