// Package stack is Hearth on a single machine: a private containerd, if wanted a private registry, and Hearth's own daemons,
// started in order, kept alive, and ended with nothing left behind.
//
// Who owns what: two folders belong to one deployment alone. Root holds data that survives (containerd's content and metadata,
// layers, Functions, logs); Run holds what lives as long as the deployment does (sockets, network namespaces, leases). One
// supervisor at a time holds both, by locks that the kernel drops when it dies. Its children are marked in their environment and
// Instances live below one cgroup, so that whoever comes after a supervisor that was killed finds everything and clears it.
//
// Children are restarted whenever they end; a restart of one leaves the others and all Instances alone.
package stack
