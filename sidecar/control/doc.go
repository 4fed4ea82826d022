// Package control is what nodeagent and a sidecar say to each other: both ends of it, so that there is one parser and one form.
// docs/SIDECAR.md describes it.
//
// It is JSON, one object a line, on a Unix stream socket that the sidecar listens on in a directory of its own. It uses the
// standard library alone, because every Instance has a sidecar in memory.
package control
