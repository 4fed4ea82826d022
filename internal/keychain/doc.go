// Package keychain learns the credentials that a kubelet pulls images with. containerd does not hand them to a snapshotter, so
// Hearth stands between: the kubelet is given Service's socket as --image-service-endpoint, every call is passed on to
// containerd's CRI as it came, and what PullImage carries is remembered by repository, in memory, for as long as the pull takes
// and a little longer. A repository's credentials are told for that repository only.
package keychain
