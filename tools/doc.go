// Package tools pins, through the tool directives of its go.mod, every program that Hearth runs but does not write:
// containerd with its shim and ctr, runc, the CNI plugins and the registry. It has a module of its own, so that none
// of their dependencies reaches Hearth's. The script build beside this file compiles them, and those of two more kinds, each with
// versions of its own: the modules in peers, which Hearth is only measured beside, and that in kubernetes, of which test
// clusters are made.
package tools
