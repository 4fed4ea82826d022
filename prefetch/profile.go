package prefetch

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
)

// Bounds of a profile, whoever made it.
const (
	maxLayers = 512
	maxFiles  = 16384
	maxRanges = 32768
	maxPath   = 1024
	maxStarts = 1_000_000
	maxOrder  = 1 << 24
	maxOffset = 1 << 44 // bytes, of a file
)

// blockBytes is what offsets and lengths are multiples of, whatever a machine's pages are.
const blockBytes = 4096

// Profile is what starts of an image have needed.
type Profile struct {
	// Starts is how many were recorded, on all nodes.
	Starts int
	// Weight is what those starts count together: the latest 1, each earlier one less.
	Weight float64
	// Lost is how many events the tracers lost in them: with any, starts have needed more than is said here.
	Lost uint64
	// Files are in the order in which a start first needs them.
	Files []File
}

// File is a file of a layer.
type File struct {
	Layer  digest.Digest // its diffID
	Path   string        // from the layer's root: clean, relative
	Ranges []Range       // ascending, apart from each other
}

// Range is part of a file, in multiples of 4 KiB; the last one may go beyond the file's end.
type Range struct {
	Offset, Length int64 // bytes
	// Order is its place in the order of first need among all ranges of the profile; equal ones were needed at about the same time.
	Order int
	// Seen is how much of the profile's Weight are starts that needed it.
	Seen float64
	// AfterReady says that no start needed it before it was ready.
	AfterReady bool
}

// Bytes is how much the profile names.
func (p *Profile) Bytes() int64 {
	var n int64
	for _, f := range p.Files {
		for _, r := range f.Ranges {
			n += r.Length
		}
	}
	return n
}

// Layers are the diffIDs of the layers that the profile knows something of, each once.
func (p *Profile) Layers() []digest.Digest {
	var list []digest.Digest
	known := map[digest.Digest]bool{}
	for _, f := range p.Files {
		if !known[f.Layer] {
			known[f.Layer] = true
			list = append(list, f.Layer)
		}
	}
	return list
}

// check says what is wrong with a profile that comes from elsewhere, or nothing.
func (p *Profile) check() error {
	switch {
	case p.Starts < 1 || p.Starts > maxStarts:
		return fmt.Errorf("profile: of %d starts", p.Starts)
	case !(p.Weight > 0) || p.Weight > float64(p.Starts):
		return fmt.Errorf("profile: %d starts count as %v", p.Starts, p.Weight)
	case len(p.Files) > maxFiles:
		return fmt.Errorf("profile: %d files are more than %d", len(p.Files), maxFiles)
	case len(p.Layers()) > maxLayers:
		return fmt.Errorf("profile: more than %d layers", maxLayers)
	}
	type name struct {
		layer digest.Digest
		path  string
	}
	ranges, names := 0, map[name]bool{}
	for _, f := range p.Files {
		if err := f.check(p.Weight); err != nil {
			return err
		}
		if ranges += len(f.Ranges); ranges > maxRanges {
			return fmt.Errorf("profile: more than %d ranges", maxRanges)
		}
		if names[name{f.Layer, f.Path}] {
			return fmt.Errorf("profile: %q is there twice", f.Path)
		}
		names[name{f.Layer, f.Path}] = true
	}
	return nil
}

func (f *File) check(weight float64) error {
	if err := f.Layer.Validate(); err != nil {
		return fmt.Errorf("profile: layer: %w", err)
	}
	if !goodPath(f.Path) {
		return fmt.Errorf("profile: %q is not a clean relative path", f.Path)
	}
	if len(f.Ranges) == 0 {
		return fmt.Errorf("profile: nothing of %q", f.Path)
	}
	end := int64(0)
	for _, r := range f.Ranges {
		switch {
		case r.Offset < end || r.Length <= 0 || r.Length > maxOffset || r.Offset > maxOffset-r.Length:
			return fmt.Errorf("profile: ranges of %q are not ascending and apart", f.Path)
		case r.Offset%blockBytes != 0 || r.Length%blockBytes != 0:
			return fmt.Errorf("profile: ranges of %q are not of whole blocks", f.Path)
		case r.Order < 0 || r.Order > maxOrder:
			return fmt.Errorf("profile: %q is number %d", f.Path, r.Order)
		case !(r.Seen > 0) || r.Seen > weight*1.01: // it is rounded
			return fmt.Errorf("profile: %q was seen %v times of %v", f.Path, r.Seen, weight)
		}
		end = r.Offset + r.Length
	}
	return nil
}

// goodPath says whether a profile can name a file so.
func goodPath(name string) bool {
	return name != "" && name != "." && len(name) <= maxPath && path.Clean(name) == name && !path.IsAbs(name) &&
		name != ".." && !strings.HasPrefix(name, "../") && utf8.ValidString(name) && !strings.ContainsRune(name, 0)
}

// first is where a file stands in the order of first need.
func (f *File) first() int {
	order := maxOrder
	for _, r := range f.Ranges {
		order = min(order, r.Order)
	}
	return order
}

// clone is a copy that shares nothing that changes.
func (p *Profile) clone() *Profile {
	c := *p
	c.Files = slices.Clone(p.Files)
	for i := range c.Files {
		c.Files[i].Ranges = slices.Clone(c.Files[i].Ranges)
	}
	return &c
}
