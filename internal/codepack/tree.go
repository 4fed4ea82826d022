package codepack

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
)

// What a package may have, at most, when nothing else is said.
const (
	DefaultMaxBytes = 512 << 20
	DefaultMaxFiles = 200_000
)

const (
	maxNameBytes = 255  // of one name in a path, as file systems have it
	maxPathBytes = 4000 // below /workspace
	maxLinks     = 40   // on the way to a file, as Linux has it
	whiteout     = ".wh."
)

// Limits of a package. Zero means the default.
type Limits struct {
	// MaxBytes of all files together.
	MaxBytes int64
	// MaxFiles, folders and links included.
	MaxFiles int
}

// Tree is what a package will have: names, sizes and links are known, contents are read when it is packed. Close it.
type Tree struct {
	path    string // as the user gave it
	single  bool   // a file, no folder
	limits  Limits
	sources []*source
	temps   []string // folders to remove
	entries map[string]entry
	bytes   int64
}

// source is a folder that entries come from.
type source struct {
	root *os.Root
	what string // for errors
}

// entry is one name in a package.
type entry struct {
	kind       fs.FileMode // type alone
	executable bool
	size       int64
	link       string // target
	from       *source
	name       string // in from
}

// Open looks at a folder, or a file, and what is in it.
func Open(name string, limits Limits) (*Tree, error) {
	limits.MaxBytes, limits.MaxFiles = cmp.Or(limits.MaxBytes, DefaultMaxBytes), cmp.Or(limits.MaxFiles, DefaultMaxFiles)
	t := &Tree{path: name, limits: limits, entries: map[string]entry{}}
	err := t.open()
	if err == nil {
		err = t.checkLinks()
	}
	if err == nil && !t.hasFiles() {
		err = errors.New("there is no file in it to pack")
	}
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("code in %s: %w", name, err)
	}
	return t, nil
}

// Select makes a Tree of single files of a folder: files has their names in the package, with folders, and their names in dir. Each
// becomes a program that all may execute. Links in dir are not followed.
func Select(dir string, files map[string]string, limits Limits) (*Tree, error) {
	limits.MaxBytes, limits.MaxFiles = cmp.Or(limits.MaxBytes, DefaultMaxBytes), cmp.Or(limits.MaxFiles, DefaultMaxFiles)
	t := &Tree{path: dir, limits: limits, entries: map[string]entry{}}
	if err := t.choose(files); err != nil {
		t.Close()
		return nil, fmt.Errorf("programs in %s: %w", dir, err)
	}
	return t, nil
}

func (t *Tree) choose(files map[string]string) error {
	from, err := t.source(t.path, t.path)
	if err != nil {
		return errors.Unwrap(err)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !fs.ValidPath(name) || name == "." {
			return fmt.Errorf("%q is no name in an image", name)
		}
		if err := t.add(name, files[name], from); err != nil {
			return err
		}
		e := t.entries[name]
		if e.kind != 0 {
			return fmt.Errorf("%q is no file (%s)", files[name], e.kind)
		}
		e.executable = true
		t.entries[name] = e
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if had, ok := t.entries[dir]; ok && had.kind != fs.ModeDir {
				return fmt.Errorf("%q is a file and a folder", dir)
			}
			t.entries[dir] = entry{kind: fs.ModeDir}
		}
	}
	return nil
}

func (t *Tree) open() error {
	info, err := os.Stat(t.path)
	if err != nil {
		return errors.Unwrap(err) // the path is named already
	}
	switch {
	case info.IsDir():
		from, err := t.source(t.path, t.path)
		if err != nil {
			return err
		}
		ig, err := from.ignore()
		if err != nil {
			return err
		}
		return t.walk(from, ig)
	case !info.Mode().IsRegular():
		return errors.New("is neither a folder nor a file")
	}
	file, err := filepath.EvalSymlinks(t.path)
	if err != nil {
		return err
	}
	from, err := t.source(filepath.Dir(file), t.path)
	if err != nil {
		return err
	}
	t.single = true
	return t.add(filepath.Base(t.path), filepath.Base(file), from)
}

func (t *Tree) source(dir, what string) (*source, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &source{root, what}
	t.sources = append(t.sources, s)
	return s, nil
}

func (s *source) ignore() (ignore, error) {
	f, err := s.root.OpenFile(IgnoreFile, openFlags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is no file", IgnoreFile))
	}
	return parseIgnore(f)
}

// walk adds what is in a folder, apart from what is left out.
func (t *Tree) walk(from *source, ig ignore) error {
	return fs.WalkDir(from.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name == ".":
			return nil
		case ig.leavesOut(name, d.IsDir()):
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		return t.add(name, name, from)
	})
}

// add puts one name into the package, unless it has that already: what was added first is the user's own.
func (t *Tree) add(name, in string, from *source) error {
	if err := checkName(name); err != nil {
		return err
	}
	info, err := from.root.Lstat(in)
	if err != nil {
		return err
	}
	e := entry{kind: info.Mode().Type(), from: from, name: in}
	switch e.kind {
	case fs.ModeDir:
	case fs.ModeSymlink:
		if e.link, err = from.root.Readlink(in); err != nil {
			return err
		}
	case 0:
		e.size, e.executable = info.Size(), info.Mode()&0o100 != 0
	default:
		return fmt.Errorf("%q is neither a file, a folder nor a link (%s): name it in %s", name, info.Mode(), IgnoreFile)
	}
	if had, ok := t.entries[name]; ok {
		if had.kind != e.kind && (had.kind == fs.ModeDir || e.kind == fs.ModeDir) {
			return fmt.Errorf("%q is a folder in one of %s and %s, and none in the other: rename yours", name, had.from.what, from.what)
		}
		return nil
	}
	t.entries[name] = e
	t.bytes += e.size
	switch {
	case len(t.entries) > t.limits.MaxFiles:
		return fmt.Errorf("more than %d files and folders: name what the function does not need in %s", t.limits.MaxFiles, IgnoreFile)
	case e.size > t.limits.MaxBytes || t.bytes > t.limits.MaxBytes:
		return fmt.Errorf("more than %d MiB, counted up to %q: name what the function does not need in %s", t.limits.MaxBytes>>20, name, IgnoreFile)
	}
	return nil
}

// checkName refuses names that a layer cannot have, or has another meaning for.
func checkName(name string) error {
	base := path.Base(name)
	switch {
	case !utf8.ValidString(name):
		return fmt.Errorf("the name %q is not UTF-8: rename it, or leave it out by %s", name, IgnoreFile)
	case strings.HasPrefix(base, whiteout):
		return fmt.Errorf("the name %q begins with %s, by which layers of images delete: rename it, or leave it out by %s", name, whiteout, IgnoreFile)
	case len(base) > maxNameBytes || len(name) > maxPathBytes:
		return fmt.Errorf("the name %.80q… is longer than %d bytes, or %d with its folders", name, maxNameBytes, maxPathBytes)
	}
	return nil
}

func (t *Tree) hasFiles() bool {
	for _, e := range t.entries {
		if e.kind == 0 {
			return true
		}
	}
	return false
}

// checkLinks refuses links that lead out of the package, or nowhere ever. A link to what is left out, or not there yet, is the
// user's matter.
func (t *Tree) checkLinks() error {
	for _, name := range t.names() {
		if t.entries[name].kind != fs.ModeSymlink {
			continue
		}
		if err := t.follow(name); err != nil {
			return fmt.Errorf("link %q to %q %w: put a copy in its place, or leave it out by %s", name, t.entries[name].link, err, IgnoreFile)
		}
	}
	return nil
}

var (
	errLeadsOut = errors.New("leads out of the code")
	errCircle   = errors.New("goes round in a circle")
)

// follow walks from name as Linux does, from link to link.
func (t *Tree) follow(name string) error {
	rest, at, links := strings.Split(name, "/"), "", 0 // at is where we are: a folder, with no link on the way
	for len(rest) > 0 {
		step := rest[0]
		rest = rest[1:]
		switch step {
		case "", ".":
			continue
		case "..":
			if at == "" {
				return errLeadsOut
			}
			if at = path.Dir(at); at == "." {
				at = ""
			}
			continue
		}
		next := path.Join(at, step)
		e, ok := t.entries[next]
		switch {
		case !ok, e.kind == 0:
			return nil // there is no way further
		case e.kind == fs.ModeDir:
			at = next
			continue
		}
		if links++; links > maxLinks {
			return errCircle
		}
		if strings.HasPrefix(e.link, "/") {
			return errLeadsOut
		}
		if rest = append(strings.Split(e.link, "/"), rest...); len(rest) > maxPathBytes {
			return errCircle
		}
	}
	return nil
}

// names are the package's, in its order: folders before what is in them.
func (t *Tree) names() []string {
	names := make([]string, 0, len(t.entries))
	for name := range t.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Bytes is the size of all files together.
func (t *Tree) Bytes() int64 { return t.bytes }

// Files counts files, folders and links.
func (t *Tree) Files() int { return len(t.entries) }

// Close lets go of the folders, and removes what was installed beside them.
func (t *Tree) Close() {
	for _, s := range t.sources {
		_ = s.root.Close()
	}
	for _, dir := range t.temps {
		_ = os.RemoveAll(dir)
	}
}
