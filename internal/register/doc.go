// Package register tells a node's containerd of Hearth's snapshotter, and takes it back: one drop-in file, with the line in the main file
// that imports it if there is none, and a restart of containerd where the one that runs has not read it. It validates before it acts, with
// the very binary that runs, and Undo gives every byte back.
//
// All of it happens in containerd's own mount namespace, so that paths, links and imports mean here what they mean there. The caller
// is a process of its own, for Enter executes it again in that namespace.
package register
