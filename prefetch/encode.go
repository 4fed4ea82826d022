package prefetch

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

const (
	// Version is that of the form in which profiles are stored and shared.
	Version = 2
	// MaxEncoded is the most bytes that an encoded profile has.
	MaxEncoded = 64 << 10
	// maxDecoded is the most that it may become when it is decompressed.
	maxDecoded = 1 << 20
)

// stored is a profile as it is written: JSON, compressed with zstd. A range is an array of its order, its first block, how many
// blocks it has, in how many hundredths of the weight it was seen, and 1 if only after ready; the last may be left out.
type stored struct {
	Version int             `json:"version"`
	Starts  int             `json:"starts"`
	Weight  float64         `json:"weight"`
	Lost    uint64          `json:"lost,omitempty"`
	Layers  []digest.Digest `json:"layers"`
	Files   []storedFile    `json:"files"`
}

type storedFile struct {
	Layer  int       `json:"layer"` // its place in Layers
	Path   string    `json:"path"`
	Ranges [][]int64 `json:"ranges"`
}

// Encode writes a profile in at most MaxEncoded bytes. If it does not fit, the ranges of least worth are left out.
func (p *Profile) Encode() ([]byte, error) {
	all, err := p.encode()
	if err != nil || len(all) > 0 {
		return all, err
	}
	worth := p.byWorth()
	var fits []byte
	most := sort.Search(len(worth), func(n int) bool { // the least number that does not fit
		some, one := p.only(worth[:n+1]).encode()
		if one != nil {
			err = one
		}
		if len(some) > len(fits) {
			fits = some
		}
		return len(some) == 0
	})
	if err == nil && most == 0 {
		err = errors.New("profile: a path is too long to be kept")
	}
	return fits, err
}

// encode is Encode as long as all fits; otherwise nothing is returned.
func (p *Profile) encode() ([]byte, error) {
	s := stored{Version: Version, Starts: p.Starts, Weight: p.Weight, Lost: p.Lost, Layers: p.Layers(), Files: make([]storedFile, len(p.Files))}
	for i, f := range p.Files {
		s.Files[i] = storedFile{Layer: slices.Index(s.Layers, f.Layer), Path: f.Path, Ranges: make([][]int64, len(f.Ranges))}
		for j, r := range f.Ranges {
			seen := max(int64(math.Round(100*r.Seen/p.Weight)), 1)
			s.Files[i].Ranges[j] = []int64{int64(r.Order), r.Offset / blockBytes, r.Length / blockBytes, seen}
			if r.AfterReady {
				s.Files[i].Ranges[j] = append(s.Files[i].Ranges[j], 1)
			}
		}
	}
	text, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode profile: %w", err)
	}
	if len(text) > maxDecoded || len(p.Files) > maxFiles {
		return nil, nil
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(128<<10))
	if err != nil {
		return nil, fmt.Errorf("encode profile: %w", err)
	}
	packed := enc.EncodeAll(text, nil)
	if len(packed) > MaxEncoded {
		return nil, nil
	}
	return packed, enc.Close()
}

// Parse reads an encoded profile, which may be anything.
func Parse(encoded []byte) (*Profile, error) {
	if len(encoded) > MaxEncoded {
		return nil, fmt.Errorf("profile of %d bytes is larger than %d", len(encoded), MaxEncoded)
	}
	dec, err := zstd.NewReader(bytes.NewReader(encoded), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxDecoded),
		zstd.WithDecoderMaxMemory(maxDecoded), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	defer dec.Close()
	text, err := io.ReadAll(io.LimitReader(dec, maxDecoded+1))
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	if len(text) > maxDecoded {
		return nil, fmt.Errorf("profile has more than %d bytes", maxDecoded)
	}
	var s stored
	if err := json.Unmarshal(text, &s); err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	if s.Version != Version {
		return nil, fmt.Errorf("profile: version %d is not %d", s.Version, Version)
	}
	return s.profile()
}

func (s *stored) profile() (*Profile, error) {
	p := &Profile{Starts: s.Starts, Weight: s.Weight, Lost: s.Lost, Files: make([]File, len(s.Files))}
	if len(s.Layers) > maxLayers || len(s.Files) > maxFiles {
		return nil, errors.New("profile: too many layers or files")
	}
	for i, f := range s.Files {
		if f.Layer < 0 || f.Layer >= len(s.Layers) {
			return nil, fmt.Errorf("profile: %q is of layer %d", f.Path, f.Layer)
		}
		p.Files[i] = File{Layer: s.Layers[f.Layer], Path: f.Path, Ranges: make([]Range, len(f.Ranges))}
		for j, r := range f.Ranges {
			if len(r) < 4 || len(r) > 5 || r[1] < 0 || r[1] > maxOffset/blockBytes || r[2] < 0 || r[2] > maxOffset/blockBytes ||
				r[0] < 0 || r[0] > maxOrder || r[3] > 100 {
				return nil, fmt.Errorf("profile: a range of %q is out of bounds", f.Path)
			}
			p.Files[i].Ranges[j] = Range{
				Offset: r[1] * blockBytes, Length: r[2] * blockBytes, Order: int(r[0]), Seen: float64(r[3]) / 100 * s.Weight,
				AfterReady: len(r) == 5 && r[4] != 0,
			}
		}
	}
	return p, p.check()
}

// place names a range of a profile.
type place struct{ file, index int }

// byWorth lists a profile's ranges, most worth first: those that most starts need, before ready, early.
func (p *Profile) byWorth() []place {
	var list []place
	for i, f := range p.Files {
		for j := range f.Ranges {
			list = append(list, place{i, j})
		}
	}
	slices.SortFunc(list, func(x, y place) int {
		a, b := p.Files[x.file].Ranges[x.index], p.Files[y.file].Ranges[y.index]
		return cmp.Or(cmp.Compare(b.Seen, a.Seen), compareBool(a.AfterReady, b.AfterReady), cmp.Compare(a.Order, b.Order),
			cmp.Compare(x.file, y.file), cmp.Compare(x.index, y.index))
	})
	return list
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// only is a profile of some of another's ranges.
func (p *Profile) only(keep []place) *Profile {
	kept := make([][]int, len(p.Files))
	for _, at := range keep {
		kept[at.file] = append(kept[at.file], at.index)
	}
	q := &Profile{Starts: p.Starts, Weight: p.Weight, Lost: p.Lost}
	for i, f := range p.Files {
		slices.Sort(kept[i])
		g := File{Layer: f.Layer, Path: f.Path}
		for _, j := range kept[i] {
			g.Ranges = append(g.Ranges, f.Ranges[j])
		}
		if len(g.Ranges) > 0 {
			q.Files = append(q.Files, g)
		}
	}
	return q
}
