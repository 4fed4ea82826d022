// Package instance is the engine of one node: it makes Instances ahead, claims them and ends them, and serves NodeService.
//
// An Instance is a CRI sandbox (a pause container with its network up) in containerd, and once it is claimed one more
// container in that sandbox's namespaces, which the engine makes by containerd's own API because the CRI is too slow for it.
// Everything that can be done before a request comes is done before: the sandbox, the files that are mounted into the container,
// the root file system's snapshot, the image's metadata.
//
// Invariants:
//   - An Instance's state only ever grows. The compare-and-swap Warm → Claimed happens in memory, under the Instance's lock,
//     and is what makes a claim one Instance's and no one else's.
//   - containerd is the only store. After a restart the engine reads sandboxes and containers by their labels: a sandbox without
//     a container is Warm, one whose container runs and is marked as serving is Serving, everything else is discarded.
//   - What was begun is ended: creations, activations and removals belong to the engine and not to the call that asked for them,
//     so that a caller who goes away strands nothing.
package instance
