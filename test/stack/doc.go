// Package stack holds the tests of Hearth as a whole on one machine: the real daemons under their real supervisor, a private
// containerd and a private registry. They are black box: what they know comes over the sockets, from containerd, and from the
// kernel. They need root and the tools of `make tools`.
//
// Each test brings up a deployment of its own, and each deployment is audited when it ends: nothing of it may be left.
package stack
