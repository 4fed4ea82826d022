// Package registry brings the bytes of OCI and Docker images from a registry to
// the node: it resolves references, reads manifests and configs, and streams
// layer blobs that arrive as parallel ranges in bounded memory.
//
// Hosts, mirrors and their order, TLS and credentials come from the same files
// that containerd and docker read (hosts.toml, config.json), because a proxy
// snapshotter is handed no credentials. Which mirror may resolve a tag and which
// may only serve digests is decided by hosts.toml, through containerd's own
// code. The requests are ours, so that ranges, retries and limits are too.
//
// What comes from a registry is foreign: manifests and configs are bounded and
// checked against their digests here; a blob's bytes are streamed as they come,
// and package layer, which hashes them anyway, verifies them.
//
// A blob moves through four hands. The dispatcher ([blob.run]) cuts it into
// spans and starts them, never more than a window ahead of the reader. A span's
// fetch fills blocks from the shared budget, and resumes where a connection
// broke; if it is late, a second fetch of the same goes beside it ([race]). The
// reader takes spans in order. The span it stands at has a block of its own, so
// that a stalled consumer elsewhere can slow a blob down but never stop it.
//
// What is learnt of a host is kept once for all blobs and registry names that
// lead to it ([host]): how many requests at once and how large a range bring the
// most ([tuner]), when it wants to be left alone, whether it can be reached.
// Each request holds a lease of the host's [pacer]. Who waits for memory or for
// a consumer gives it up meanwhile, so a lease is never held for long.
package registry
