package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"time"
)

// The image of small files: so many, of so many bytes, as a tree of modules has them.
const (
	smallFiles, smallPackages   = 100_000, 1000
	smallLeast, smallMost       = 100, 4096
	corpusBytes, corpusLongest  = 32 << 20, 64 << 10
	smallSeed1, smallSeed2      = 20, 26 // the image is the same each time
	smallFolders, smallInFolder = 4, smallFiles / smallPackages / 4
)

// shapeTime is what made-up files have.
func shapeTime() time.Time { return time.Date(2024, 2, 29, 12, 0, 0, 0, time.UTC) }

// small is one layer of very many small files, cut out of real ones, which compress as such files do. Most are smaller than the
// mean: their sizes are uniform on a logarithmic scale.
func (s *shape) small() error {
	text, err := s.corpus()
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(smallSeed1, smallSeed2))
	return s.add(func(out *tar.Writer) error {
		if err := s.function(out); err != nil {
			return err
		}
		folder := func(format string, args ...any) error {
			return out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf(format, args...), Mode: 0o755, ModTime: shapeTime()})
		}
		if err := folder("modules/"); err != nil {
			return err
		}
		for p := range smallPackages {
			if err := folder("modules/package-%04d/", p); err != nil {
				return err
			}
			for d := range smallFolders {
				if err := folder("modules/package-%04d/part-%d/", p, d); err != nil {
					return err
				}
				for f := range smallInFolder {
					size := int(smallLeast * math.Pow(float64(smallMost)/smallLeast, random.Float64()))
					at := random.IntN(len(text) - size)
					h := &tar.Header{
						Typeflag: tar.TypeReg, Name: fmt.Sprintf("modules/package-%04d/part-%d/file-%02d.py", p, d, f),
						Size: int64(size), Mode: 0o644, ModTime: shapeTime(),
					}
					if err := put(out, h, bytes.NewReader(text[at:at+size])); err != nil {
						return err
					}
				}
			}
		}
		return s.ctx.Err()
	})
}

// corpus is what the files of Python's packages hold that are not long, one after the other.
func (s *shape) corpus() ([]byte, error) {
	var text bytes.Buffer
	err := s.entries("python", 1, func(h *tar.Header, content io.Reader) error {
		if h.Typeflag != tar.TypeReg || h.Size > corpusLongest || text.Len() > corpusBytes {
			return nil
		}
		_, err := io.Copy(&text, content)
		return err
	})
	if err == nil && text.Len() < 2*smallMost {
		err = fmt.Errorf("there are only %d bytes to cut small files out of", text.Len())
	}
	return text.Bytes(), err
}
