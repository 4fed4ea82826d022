package prefetch

import "github.com/opencontainers/go-digest"

// Image is what a start reads from: the layers of an image, or those of a Runtime's image and on top of them a code package's.
type Image struct {
	ChainID digest.Digest // of all Layers, as the OCI image specification has it: what its profile is kept under
	Layers  []Layer       // base first
}

// Layer is one layer of an Image on this node.
type Layer struct {
	DiffID digest.Digest
	Dir    string // absolute: the root of its tree, by itself and not as part of an overlay
}
