// Package runtimes holds the sources of the programs that Hearth itself puts into Instances, so that whoever builds the
// images needs no checkout of the project.
package runtimes

import _ "embed"

//go:embed pause/main.go
var pause []byte

// Pause returns the Go source of the program of the pause image: one file of package main, standard library only.
// The caller owns the copy.
func Pause() []byte { return append([]byte(nil), pause...) }
