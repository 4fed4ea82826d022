// Package codepack makes a code package: a folder or a file, as an OCI image of one layer that nodes mount at /workspace.
//
// A package depends on nothing but names, bytes, symbolic links and who may execute what: the same code gives the same digest on
// any machine, on any day, whoever owns the files. So nodes that have it need not fetch it again, and neither need a registry be
// sent what it has. (The digest is that of compressed bytes; another version of Hearth may compress otherwise.)
//
// The layer is zstd in the frames of package layer, which a node decodes side by side; any containerd reads it.
//
// What is packed stands in a folder of the user's and may change while it is read: whatever would make the package other than
// the Tree that was shown and checked is an error. A Tree belongs to one goroutine.
package codepack
