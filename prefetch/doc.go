// Package prefetch has in memory what a start reads, before the start asks for it.
//
// A start reads a few per cent of its image. A Tracer (package prefetch/trace) says which, by device and inode; Start.End finds the
// layers' files that those are, and merges them into the image's profile: per layer and path, so that it holds on every node and
// for every image with that layer, the ranges in the order of first need, with how many starts needed them. Recorded are the first
// starts of an image, and then one now and then. When an Instance is claimed, Replay reads the profile's ranges ahead, in that order,
// below others' reads in priority. What several images of a node need is kept in memory (keep.go).
//
// A profile is a hint. One that is stale, cut short or made up by somebody costs a bounded time and memory, and nothing else:
// paths are opened below their layer only, and every number has a limit.
package prefetch
