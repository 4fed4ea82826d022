// Package cluster runs a real Kubernetes on one Linux machine, for tests and for trying things: etcd, an API server with a
// controller manager and a scheduler, CoreDNS, a registry, and any number of nodes with a kubelet, a containerd and a kube-proxy
// each. docs/CLUSTER.md explains it to who uses it.
//
// A machine of the cluster (the control plane is one, each node another) is a set of namespaces: mounts, network, host name. In
// its mount namespace it has folders of its own at the usual places (/etc, /opt, /run, /var), so what runs on it, a DaemonSet with
// hostPath volumes too, finds the paths that it would find on any node; mounts propagate there as on any node. Process ids are
// the host's. Everything of a machine runs in cgroups below one of its own, and nothing of it is mounted, or filtered, in the
// host's namespaces: to end all processes in those cgroups is to remove the machine, however its makers ended.
//
// The host has one thing of a cluster beside processes and cgroups: a link into the control plane's network, where a bridge joins
// all machines. Its name comes from the cluster's folder, as do the cgroups', so whoever knows the folder finds what is left.
package cluster
