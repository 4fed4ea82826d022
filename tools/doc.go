// Package tools pins, through the tool directives of its go.mod, every program that Hearth runs but does not write:
// containerd with its shim and ctr, runc, the CNI plugins and the registry. It has a module of its own, so that none
// of their dependencies reaches Hearth's. The script build beside this file compiles them, and those of the modules in
// peers too, which Hearth is only measured beside: each of these brings versions of its own.
package tools
