// Package cluster is a cluster as its user sees it: what hearth does on Kubernetes, by the kubeconfig's own rights.
//
// Functions, Runtimes and WarmPools are applied and waited for as custom resources; Instances and logs are those of pods; requests go through
// a forwarded port of a gateway. Errors have connect's codes (NotFound, Unavailable, PermissionDenied, …), as those of the daemons have, so
// that a caller does not see the difference. Nothing is connected to before it is needed. A Client may be used by several goroutines.
package cluster
