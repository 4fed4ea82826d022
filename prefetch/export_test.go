package prefetch

import "io"

// ParseProfile reads a stored profile.
func ParseProfile(text []byte) (*Profile, error) { return parseProfile(text) }

// Encode writes one.
func (p *Profile) Encode() ([]byte, error) { return p.encode() }

// Merge adds another start's.
func (p *Profile) Merge(other *Profile) { p.merge(other) }

// ParseMaps returns the paths of the mappings in a process's list.
func ParseMaps(r io.Reader) (paths []string, err error) {
	areas, err := parseMaps(r)
	for _, a := range areas {
		paths = append(paths, a.path)
	}
	return paths, err
}
