// Package snapshotter is containerd's proxy snapshotter of a node. Snapshots are overlayfs directories as containerd's own
// overlay snapshotter keeps them, and image layers come by the remote-snapshot protocol: when containerd prepares a snapshot to
// unpack a layer into, the layer is fetched and unpacked here, committed under its chain ID, and containerd is told that it
// exists already.
//
// On disk, below the root:
//
//	metadata.db        names, parents and labels of snapshots (containerd's MetaStore)
//	snapshots/<id>/fs  a snapshot's directory, or a symbolic link to the layer's tree
//	layers/<diffID>/   the tree of an unpacked layer (fs) and what is known of it (layer.json)
//	                   a layer that is kept as an EROFS image (layer.erofs) has it mounted on fs
//	staging/           trees in the making
//	trash/             what is being deleted
//
// A layer's tree is kept once, whatever images and chains it is part of; only the tree of a layer whose tar leaves directories
// implicit depends on its parents, and carries the chain ID in its name. A name in layers/ appears by a rename after everything
// below it is durable. Nothing in staging/ or trash/ outlives a restart, and what no snapshot points to is swept.
//
// Speed is optional, correctness is not. What keeps us from serving a layer makes Prepare answer with ordinary writable mounts,
// and containerd pulls as usual. Bytes that are wrong are an error instead: a fallback could hide it.
//
// Jobs, one per layer, are shared by all who wait for that layer, and cancelled when no one does. An image whose first layer was
// asked for waits for all of its layers: that is what makes them come in parallel although containerd asks one by one.
//
// The capability "rebase" must never be advertised for this snapshotter: a snapshot that we commit has its parent from the start.
package snapshotter
