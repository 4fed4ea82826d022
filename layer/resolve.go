package layer

import (
	"errors"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// walker is a tree whose paths resolve walks; D, a pointer, is one of its directories. What a path of a layer may lead through is
// the same for every form of a tree, and decided in one place, which is why a tree has to offer so many small things.
type walker[D comparable] interface {
	// start gives the longest known beginning of a path, and how long it is.
	start(name string) (D, int)
	// step gives the directory called base, made if it is missing and may be, or the target of a symbolic link, or an error.
	step(at D, base string, create bool) (next D, target string, err error)
	// place is the directory's path without symbolic links, "" for the root.
	place(d D) string
	// remember notes that name led to d.
	remember(name string, d D)
	// drop gives back what start or step gave.
	drop(d D)
}

// missing says whether directories that are not there are made.
type missing int

const (
	failMissing missing = iota
	makeMissing
)

// resolve gives the directory at name, a clean relative path or "" for the root. Symbolic links are followed within the root: a
// relative target must not climb above it, an absolute one counts from it and must exist already. With failMissing a missing
// directory is unix.ENOENT.
func resolve[D comparable](t walker[D], name string, mode missing) (found D, err error) {
	var none D
	asked, links := name, 0
	must := 0 // so much of name has to exist, since an absolute link promised it
	cur, at := t.start(name)
	for at < len(name) {
		if name[at] == '/' {
			at++
		}
		end := len(name)
		if i := strings.IndexByte(name[at:], '/'); i >= 0 {
			end = at + i
		}
		base := name[at:end]
		next, target, err := t.step(cur, base, mode == makeMissing && end > must)
		switch {
		case err != nil:
			t.drop(cur)
			if end <= must && errors.Is(err, unix.ENOENT) {
				return none, refuse("its path leads through an absolute symbolic link to %q, which is no directory of this layer", name[:must])
			}
			return none, err
		case next != none:
			t.drop(cur)
			cur, at = next, end
			t.remember(name[:at], cur)
			continue
		}
		if links++; links > maxLinks {
			t.drop(cur)
			return none, &refusal{reason: "its path leads through too many symbolic links", err: unix.ELOOP}
		}
		to, absolute, err := follow(t.place(cur), base, target)
		t.drop(cur)
		if err != nil {
			return none, err
		}
		if absolute || end <= must {
			must = len(to) + max(must-end, 0)
		} else {
			must = 0
		}
		name = strings.TrimPrefix(to+name[end:], "/")
		if len(name) > maxPath {
			return none, &refusal{reason: "its path", err: unix.ENAMETOOLONG}
		}
		cur, at = t.start(name)
	}
	if name != asked {
		t.remember(asked, cur)
	}
	return cur, nil
}

// follow gives the path that a link called base in dir leads to.
func follow(dir, base, target string) (to string, absolute bool, err error) {
	if strings.HasPrefix(target, "/") {
		return strings.TrimPrefix(path.Clean(target), "/"), true, nil
	}
	to = path.Join(dir, target)
	if to == ".." || strings.HasPrefix(to, "../") {
		return "", false, refuse("its path leads through the symbolic link %q, whose target %q climbs out of the layer", path.Join(dir, base), target)
	}
	if to == "." {
		to = ""
	}
	return to, false, nil
}
