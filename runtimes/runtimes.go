// Package runtimes holds the sources of the programs that Hearth itself puts into Instances, so that whoever builds the
// images needs no checkout of the project: the pause program of every sandbox, and the loaders that boot the Runtimes
// (docs/RUNTIMES.md), each in the folder of its Runtime's name.
package runtimes

import (
	"embed"
	"io/fs"
	"strings"
)

//go:embed pause/main.go
var pause []byte

//go:embed python node java native/main.go
var loaders embed.FS

// Pause returns the Go source of the program of the pause image: one file of package main, standard library only.
// The caller owns the copy.
func Pause() []byte { return append([]byte(nil), pause...) }

// Names returns the Runtimes that Hearth has a loader for.
func Names() []string { return []string{"python", "node", "java", "native"} }

// Loader returns the sources of a Runtime's loader by their path below its folder, and whether there is such a Runtime. The
// caller owns the copies.
func Loader(name string) (sources map[string][]byte, ok bool) {
	sources = map[string][]byte{}
	err := fs.WalkDir(loaders, name, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := loaders.ReadFile(path)
		sources[strings.TrimPrefix(path, name+"/")] = text
		return err
	})
	return sources, err == nil
}
