// Package instance is the engine of one node: it makes Instances ahead, claims them and ends them, and serves NodeService.
//
// An Instance is a CRI sandbox (a pause container with its network up) in containerd, and one more container in that sandbox's
// namespaces, in which the launcher of runtimes/launcher waits. Everything that can be done before a request comes is done
// before: the sandbox, the container with its restrictions, the image's metadata, a snapshot of it and its mount, which nobody
// sees yet. When the Instance is claimed the engine exchanges the container's root file system for that mount and has the
// launcher execute the Function's process in its place. Neither containerd nor runc is in that path: they would take some 100 ms.
//
// A Runtime is booted ahead in the same way: its loader is what the launcher becomes before anyone claims the Instance. A claim
// then mounts code and secrets into the running container, and has the loader load them (docs/RUNTIMES.md).
//
// Invariants:
//   - An Instance moves as the table of moves says, each time with a higher version. The compare-and-swap to Claimed, from Warm or,
//     for the same Revision, from Frozen, happens in memory, under the Instance's lock, and is what makes a claim one Instance's
//     and no one else's.
//   - containerd and the kernel's freezers are the only store. After a restart the engine reads sandboxes and containers by their
//     labels: one whose launcher still waits is Warm, one whose container runs and was recorded as serving is Serving, one that
//     was recorded and is held by its freezer is Frozen, everything else is discarded.
//   - Before anything of a Function is in an Instance with a Runtime, the Instance is marked on disk. A marked one is never Warm
//     again, whatever its loader says.
//   - What was begun is ended: creations, activations and removals belong to the engine and not to the call that asked for them,
//     so that a caller who goes away strands nothing.
package instance
