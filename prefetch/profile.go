package prefetch

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
)

const (
	profileVersion = 1
	maxProfile     = 256 << 10 // bytes of a stored profile
	maxFiles       = 4096
	maxRanges      = 16384
	maxPath        = 4096
)

// Profile is what starts of an image have needed, in the order of first need.
type Profile struct {
	Version int    `json:"version"`
	Starts  int    `json:"starts"` // how many were observed
	Files   []File `json:"files"`
}

// File is a file of an image, by its absolute path there.
type File struct {
	Path   string  `json:"path"`
	Ranges []Range `json:"ranges"` // ascending, apart from each other
}

// Range is part of a file, in bytes.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
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

// parseProfile reads a stored profile, which may be anything.
func parseProfile(text []byte) (*Profile, error) {
	if len(text) > maxProfile {
		return nil, fmt.Errorf("profile of %d bytes is larger than %d", len(text), maxProfile)
	}
	p := &Profile{}
	if err := json.Unmarshal(text, p); err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	return p, p.check()
}

func (p *Profile) check() error {
	if p.Version != profileVersion || p.Starts < 1 {
		return fmt.Errorf("profile: version %d of %d starts is not one of version %d", p.Version, p.Starts, profileVersion)
	}
	if len(p.Files) > maxFiles {
		return fmt.Errorf("profile: %d files are more than %d", len(p.Files), maxFiles)
	}
	ranges, sum := 0, int64(0)
	for _, f := range p.Files {
		if len(f.Path) > maxPath || !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path {
			return fmt.Errorf("profile: %q is not a clean absolute path", f.Path)
		}
		if ranges += len(f.Ranges); ranges > maxRanges {
			return fmt.Errorf("profile: more than %d ranges", maxRanges)
		}
		end := int64(-1)
		for _, r := range f.Ranges {
			if r.Offset <= end || r.Length <= 0 || r.Offset > math.MaxInt64-r.Length || sum > math.MaxInt64-r.Length {
				return fmt.Errorf("profile: ranges of %s are not ascending and apart", f.Path)
			}
			end = r.Offset + r.Length
			sum += r.Length
		}
	}
	return nil
}

// merge adds what another start has needed, after what is known.
func (p *Profile) merge(other *Profile) {
	p.Starts += other.Starts
	at := map[string]int{}
	for i, f := range p.Files {
		at[f.Path] = i
	}
	for _, f := range other.Files {
		if i, ok := at[f.Path]; ok {
			p.Files[i].Ranges = union(append(slices.Clone(p.Files[i].Ranges), f.Ranges...))
		} else {
			p.Files = append(p.Files, f)
		}
	}
}

// union sorts ranges and joins those that touch.
func union(ranges []Range) []Range {
	slices.SortFunc(ranges, func(a, b Range) int { return cmp.Compare(a.Offset, b.Offset) })
	var joined []Range
	for _, r := range ranges {
		last := len(joined) - 1
		if last < 0 || r.Offset > joined[last].Offset+joined[last].Length {
			joined = append(joined, r)
			continue
		}
		joined[last].Length = max(joined[last].Length, r.Offset+r.Length-joined[last].Offset)
	}
	return joined
}

// encode is the opposite of parseProfile. A profile over the bounds is an error: it would not be read again.
func (p *Profile) encode() ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	text, err := json.Marshal(p)
	if err == nil && len(text) > maxProfile {
		err = errors.New("profile: too large to keep")
	}
	return text, err
}
