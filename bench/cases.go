package bench

import (
	"context"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/bench/link"
)

// siblings is an image as gzip, beside which `hearth image accelerate` has put the same layers in encodings that are faster to
// unpack. Who does not know of them pulls the original.
const siblings = "siblings"

// pullCase is an image, how its layers are encoded, and the link that they come over.
type pullCase struct{ image, encoding, link string }

func (c pullCase) String() string { return c.image + "/" + c.encoding + "/" + c.link }

// Encodings that a pull can be asked for.
func Encodings() []string {
	return []string{string(images.Gzip), string(images.Zstd), string(images.ZstdFrames), siblings}
}

// Links that a pull can be asked for.
func Links() []string { return slices.Sorted(maps.Keys(link.Named())) }

// SampleImages are those that a pull is measured with.
func SampleImages() []string {
	others := []string{"pause", "flask", "large-java"} // too small, or no other than those that there are
	return slices.DeleteFunc(images.Names(), func(name string) bool {
		return slices.Contains(others, name) || strings.HasPrefix(name, "runtime-")
	})
}

// pullCases are those that were asked for: all combinations, if anything was chosen, and otherwise the ones that tell most.
func (o *Options) pullCases() ([]pullCase, error) {
	if len(o.Images)+len(o.Encodings)+len(o.Links) == 0 && o.Image == "" {
		return o.usualCases(), nil
	}
	names, encodings, links := o.Images, o.Encodings, o.Links
	if o.Image != "" {
		names = append(slices.Clone(names), foreignName(o.Image))
	}
	for list, fallback := range map[*[]string][]string{&names: SampleImages(), &encodings: {string(images.Gzip)}, &links: {"loopback"}} {
		if len(*list) == 0 {
			*list = fallback
		}
	}
	for _, chosen := range []struct {
		what      string
		have, all []string
	}{{"image", o.Images, SampleImages()}, {"encoding", encodings, Encodings()}, {"link", links, Links()}} {
		for _, name := range chosen.have {
			if !slices.Contains(chosen.all, name) {
				return nil, fmt.Errorf("there is no %s %q: choose of %s", chosen.what, name, strings.Join(chosen.all, ", "))
			}
		}
	}
	var cases []pullCase
	for _, image := range names {
		for _, encoding := range encodings {
			for _, link := range links {
				cases = append(cases, pullCase{image, encoding, link})
			}
		}
	}
	return cases, nil
}

// usualCases of a quick run fit its time.
func (o *Options) usualCases() []pullCase {
	gzip := string(images.Gzip)
	if o.Quick {
		return []pullCase{{"python", gzip, "loopback"}, {"java", gzip, "loopback"}, {"go", gzip, "loopback"}}
	}
	var cases []pullCase
	for _, image := range SampleImages() {
		cases = append(cases, pullCase{image, gzip, "loopback"})
	}
	for _, image := range []string{"python", "java"} {
		for _, encoding := range Encodings()[1:] {
			cases = append(cases, pullCase{image, encoding, "loopback"})
		}
	}
	for _, image := range []string{"python", "fat"} {
		cases = append(cases, pullCase{image, gzip, "gigabit"}, pullCase{image, gzip, "capped"})
	}
	return append(cases, pullCase{"python", siblings, "capped"})
}

// foreignName is what the case of an image of another registry is called.
func foreignName(ref string) string {
	name, _, _ := strings.Cut(ref, "@")
	name = name[strings.LastIndexByte(name, '/')+1:]
	return "image-" + strings.ReplaceAll(name, ":", "-")
}

// accelerate puts siblings beside an image in a registry.
func (o *Options) accelerate(ctx context.Context, ref string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(o.Bin, "hearth"), "image", "accelerate", ref, "--encoding", "both")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("hearth image accelerate %s: %w: %s", ref, err, out)
	}
	return nil
}

// canAccelerate says whether this hearth has the command.
func (o *Options) canAccelerate(ctx context.Context) bool {
	help, err := exec.CommandContext(ctx, filepath.Join(o.Bin, "hearth"), "image", "accelerate", "--help").CombinedOutput()
	return err == nil && strings.Contains(string(help), "image accelerate")
}
