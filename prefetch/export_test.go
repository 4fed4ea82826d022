package prefetch

import "time"

// Followed, Joined and Plan are what a Prefetcher does with profiles.
func (p *Profile) Followed(start *Profile) *Profile { return p.followed(start) }
func (p *Profile) Joined(foreign *Profile) *Profile { return p.joined(foreign) }

// Check says what would be wrong with a profile if it came from elsewhere.
func (p *Profile) Check() error { return p.check() }

// Planned is what is read ahead, in order.
type Planned struct {
	Path           string
	Offset, Length int64
}

// Plan is what is read ahead of a profile, in order.
func (p *Profile) Plan() (list []Planned) {
	for _, s := range p.plan() {
		for _, r := range s.ranges {
			list = append(list, Planned{s.path, r.offset, r.length})
		}
	}
	return list
}

// Resident is how much of a file below a directory is in memory, of all that it has; -1 if it is not there.
func Resident(layer Layer, path string) (resident, all int64) {
	roots := openRoots([]Layer{layer})
	defer closeRoots(roots)
	f, ok := openFile(roots[layer.DiffID], path)
	if !ok {
		return -1, -1
	}
	defer f.close()
	return f.size - f.missing(span{0, f.size}), f.size
}

// ResidentBytes is likewise, as kernels without cachestat tell it.
func ResidentBytes(layer Layer, path string) int64 {
	roots := openRoots([]Layer{layer})
	defer closeRoots(roots)
	f, ok := openFile(roots[layer.DiffID], path)
	if !ok {
		return -1
	}
	defer f.close()
	return f.residentBytes(span{0, f.size}, 4096)
}

// Resolve finds files of layers by their ids.
func Resolve(layers []Layer, ids [][2]uint64) map[[2]uint64]string {
	wanted, known := map[fileID]bool{}, map[fileID]fileKey{}
	for _, id := range ids {
		wanted[fileID{id[0], id[1]}] = true
	}
	resolve(layers, wanted, known, time.Now().Add(time.Minute))
	found := map[[2]uint64]string{}
	for id, key := range known {
		found[[2]uint64{id.device, id.inode}] = string(key.layer) + " " + key.path
	}
	return found
}

// Share is the part of n that both is of all.
func Share(n, both, all int64) int64 { return share(n, both, all) }
