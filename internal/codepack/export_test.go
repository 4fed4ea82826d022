package codepack

import "io"

// Ignore parses patterns, and gives what they leave out.
func Ignore(r io.Reader) (leavesOut func(name string, folder bool) bool, err error) {
	ig, err := parseIgnore(r)
	return ig.leavesOut, err
}

// ELFMachine reads the head of a file.
var ELFMachine = elfMachine
