package images

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// shaped builds the layers of an image that has a certain shape, of the files of other images.
func (b *builder) shaped(ctx context.Context, name string, r recipe, dir string) ([]*blob, error) {
	from := map[string]v1.Image{}
	for _, each := range r.From {
		source, ok := recipeOf(each)
		if !ok {
			return nil, fmt.Errorf("it is made of %s, which does not exist", each)
		}
		path, err := b.image(ctx, each, source)
		if err != nil {
			return nil, err
		}
		if from[each], err = open(path); err != nil {
			return nil, err
		}
	}
	s := &shape{ctx: ctx, from: from, dir: dir}
	shapes := map[string]func() error{"fat": s.fat, "layers": s.many, "smallfiles": s.small, "torture": s.torture}
	err := b.step(name, "write its layers", shapes[name])
	return s.layers, err
}

// shape collects the layers of one image.
type shape struct {
	ctx    context.Context
	from   map[string]v1.Image
	dir    string
	layers []*blob
}

// add writes one more layer.
func (s *shape) add(write func(*tar.Writer) error) error {
	return s.pack(func(w io.Writer) error {
		out := tar.NewWriter(w)
		if err := write(out); err != nil {
			return err
		}
		return out.Close()
	})
}

// pack is add for what archive/tar cannot write.
func (s *shape) pack(write func(io.Writer) error) error {
	layer, err := packed(filepath.Join(s.dir, fmt.Sprintf("layer-%d.tar.gz", len(s.layers))), write)
	s.layers = append(s.layers, layer)
	return err
}

// entries calls visit with each entry of a layer, the lowest being 0, until one fails.
func (s *shape) entries(image string, layer int, visit func(*tar.Header, io.Reader) error) error {
	layers, err := s.from[image].Layers()
	if err != nil {
		return err
	}
	if layer >= len(layers) {
		return fmt.Errorf("%s has no layer %d", image, layer)
	}
	content, err := layers[layer].Uncompressed()
	if err != nil {
		return err
	}
	defer content.Close()
	in := tar.NewReader(content)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = s.ctx.Err()
		}
		if err == nil {
			h.Name = strings.TrimPrefix(h.Name, "./")
			err = visit(h, in)
		}
		if err != nil {
			return fmt.Errorf("layer %d of %s: %w", layer, image, err)
		}
	}
}

// function writes the static function that makes an image answer requests, whatever else is in it.
func (s *shape) function(out *tar.Writer) error {
	return s.entries("go", 0, func(h *tar.Header, content io.Reader) error { return put(out, h, content) })
}

func put(out *tar.Writer, h *tar.Header, content io.Reader) error {
	if err := out.WriteHeader(h); err != nil {
		return fmt.Errorf("write tar header of %s: %w", h.Name, err)
	}
	_, err := io.Copy(out, content)
	return err
}

// fat is one layer of half a gigabyte: a Debian base and what Python, Java and Node add to it, each in a folder of its own.
func (s *shape) fat() error {
	return s.add(func(out *tar.Writer) error {
		if err := s.function(out); err != nil {
			return err
		}
		for _, part := range []struct {
			image, dir string
			layer      int
		}{{"node", "debian", 0}, {"java", "java", 1}, {"node", "node", 1}} {
			if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: part.dir + "/", Mode: 0o755, ModTime: shapeTime()}); err != nil {
				return err
			}
			if err := s.entries(part.image, part.layer, func(h *tar.Header, content io.Reader) error {
				if strings.HasPrefix(path.Base(h.Name), whiteoutPrefix) {
					return nil
				}
				h.Name = part.dir + "/" + h.Name
				if h.Typeflag == tar.TypeLink {
					h.Linkname = part.dir + "/" + strings.TrimPrefix(h.Linkname, "./")
				}
				return put(out, h, content)
			}); err != nil {
				return err
			}
		}
		return nil
	})
}

// layerCount is how many layers the image of many layers has.
const layerCount = 40

// many has Python's image in many layers: the packages are cut into runs of files, as a long Dockerfile would.
func (s *shape) many() error {
	if err := s.copyLayer("python", 0); err != nil {
		return err
	}
	cuts, err := s.cuts("python", 1, layerCount-2)
	if err != nil {
		return err
	}
	// A layer has the folders above its files again, as builders of images write them.
	folders := map[string]*tar.Header{}
	for i, from := 0, 0; i < len(cuts); i++ {
		to := cuts[i]
		if err := s.add(func(out *tar.Writer) error { return s.run("python", 1, from, to, folders, out) }); err != nil {
			return err
		}
		from = to
	}
	return s.copyLayer("python", 2)
}

// copyLayer adds a layer of another image as it is.
func (s *shape) copyLayer(image string, layer int) error {
	return s.add(func(out *tar.Writer) error {
		return s.entries(image, layer, func(h *tar.Header, content io.Reader) error { return put(out, h, content) })
	})
}

// cuts divides the entries of a layer into so many runs of about as many entries, and returns the end of each. No run ends
// between a file and a hard link to it.
func (s *shape) cuts(image string, layer, runs int) ([]int, error) {
	var spans []int // for each entry, the last one that links to it
	index := map[string]int{}
	err := s.entries(image, layer, func(h *tar.Header, _ io.Reader) error {
		index[h.Name] = len(spans)
		if h.Typeflag == tar.TypeLink {
			spans[index[strings.TrimPrefix(h.Linkname, "./")]] = len(spans)
		}
		spans = append(spans, len(spans))
		return nil
	})
	if err != nil {
		return nil, err
	}
	var cuts []int
	reach := -1 // nothing before the entry at hand is linked to beyond this one
	for i, last := range spans {
		if due := len(cuts) + 1; due < runs && i >= len(spans)*due/runs && reach < i {
			cuts = append(cuts, i)
		}
		reach = max(reach, last)
	}
	return append(cuts, len(spans)), nil
}

// run writes the entries from one to before another, below the folders that they lie in.
func (s *shape) run(image string, layer, from, to int, folders map[string]*tar.Header, out *tar.Writer) error {
	i := -1
	written := map[string]bool{}
	return s.entries(image, layer, func(h *tar.Header, content io.Reader) error {
		i++
		if i < from || i >= to {
			return nil
		}
		for at, c := range h.Name {
			folder := h.Name[:at+1]
			if above := folders[folder]; c == '/' && above != nil && !written[folder] {
				written[folder] = true
				if err := out.WriteHeader(above); err != nil {
					return err
				}
			}
		}
		if h.Typeflag == tar.TypeDir && !written[h.Name] {
			folders[h.Name], written[h.Name] = h, true
		}
		return put(out, h, content)
	})
}
