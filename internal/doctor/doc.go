// Package doctor looks at a node and says what keeps it from pulling images through Hearth's snapshotter: containerd's
// configuration with all that it imports, the kernel, the daemons' sockets and the disk. Each finding says what is there, what
// it means and the very line to change.
//
// Load and Parse read a configuration the way containerd does, for its versions 1 to 4; Probe asks the machine; Diagnose judges
// both and touches nothing. Nothing here changes the node.
package doctor
