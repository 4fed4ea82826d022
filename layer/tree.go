package layer

import (
	"container/list"
	"errors"
	"fmt"
	"path"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// maxLinks is how many symbolic links one path may lead through, as in the kernel.
	maxLinks = 40
	// maxDirs is how many directories of a layer are kept open; tars are written directory by directory.
	maxDirs = 64
	// maxPath is the kernel's PATH_MAX without the closing NUL.
	maxPath = unix.PathMax - 1
)

// pathKey is a place in the tree: a directory by its path without symbolic links, and a name in it.
type pathKey struct{ dir, base string }

// tree resolves paths of a layer to directory handles. Each step is an openat of one name with O_NOFOLLOW below a handle, and
// symbolic links are read and resolved here, so that no path can leave the root whatever it says.
//
// It belongs to the parser; only the handles that it gives out may be used, and released, elsewhere.
type tree struct {
	root *dir
	// arrive waits until a file that is still being written at a place is there.
	arrive func(pathKey) error
	// implied is told of every directory that is about to be made because a path needs it.
	implied func(pathKey) error

	cache map[string]*list.Element // path as tars spell it -> dir, links resolved
	lru   *list.List               // of cached, newest first

	mu   sync.Mutex // guards open
	open map[*dir]struct{}
}

type cached struct {
	name string
	dir  *dir
}

// dir is an open directory of the tree. Whoever holds one releases it.
type dir struct {
	fd   int
	path string // relative to the root, no links, "" for the root
	refs atomic.Int32
	tree *tree
}

func openTree(root string) (*tree, error) {
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	t := &tree{cache: map[string]*list.Element{}, lru: list.New(), open: map[*dir]struct{}{}}
	t.root = t.adopt(fd, "")
	return t, nil
}

func (t *tree) adopt(fd int, path string) *dir {
	d := &dir{fd: fd, path: path, tree: t}
	d.refs.Store(1)
	t.mu.Lock()
	t.open[d] = struct{}{}
	t.mu.Unlock()
	return d
}

func (d *dir) retain() *dir { d.refs.Add(1); return d }

func (d *dir) release() {
	if d.refs.Add(-1) != 0 {
		return
	}
	d.tree.mu.Lock()
	delete(d.tree.open, d)
	d.tree.mu.Unlock()
	_ = unix.Close(d.fd)
}

func (d *dir) join(name string) string {
	if d.path == "" {
		return name
	}
	return d.path + "/" + name
}

// close closes every handle, also those that someone failed to release; nobody may use one any more.
func (t *tree) close() {
	for d := range t.open {
		_ = unix.Close(d.fd)
	}
	t.open = nil
}

// forget drops the cache: a directory or a link that paths may lead through is about to go.
func (t *tree) forget() {
	for e := t.lru.Front(); e != nil; e = e.Next() {
		e.Value.(*cached).dir.release()
	}
	t.lru.Init()
	clear(t.cache)
}

// remember caches a directory under the path that led to it.
func (t *tree) remember(name string, d *dir) {
	if e := t.cache[name]; e != nil {
		old := e.Value.(*cached)
		d.retain()
		old.dir.release()
		old.dir = d
		t.lru.MoveToFront(e)
		return
	}
	t.cache[name] = t.lru.PushFront(&cached{name, d.retain()})
	if t.lru.Len() > maxDirs {
		c := t.lru.Remove(t.lru.Back()).(*cached)
		delete(t.cache, c.name)
		c.dir.release()
	}
}

// start gives the longest cached beginning of a path, and how long it is.
func (t *tree) start(name string) (*dir, int) {
	for n := len(name); n > 0; n = strings.LastIndexByte(name[:n], '/') {
		if e := t.cache[name[:n]]; e != nil {
			t.lru.MoveToFront(e)
			return e.Value.(*cached).dir.retain(), n
		}
	}
	return t.root.retain(), 0
}

// missing says whether directories that are not there are made.
type missing int

const (
	failMissing missing = iota
	makeMissing
)

// lookup gives the directory at name, a clean relative path or "" for the root. Symbolic links are followed within the root: a
// relative target must not climb above it, an absolute one counts from it and must exist already. With failMissing a missing
// directory is unix.ENOENT. The caller releases what it gets.
func (t *tree) lookup(name string, mode missing) (*dir, error) {
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
			cur.release()
			if end <= must && errors.Is(err, unix.ENOENT) {
				return nil, refuse("its path leads through an absolute symbolic link to %q, which is no directory of this layer", name[:must])
			}
			return nil, err
		case next != nil:
			cur.release()
			cur, at = next, end
			t.remember(name[:at], cur)
			continue
		}
		if links++; links > maxLinks {
			cur.release()
			return nil, &refusal{reason: "its path leads through too many symbolic links", err: unix.ELOOP}
		}
		to, absolute, err := follow(cur.path, base, target)
		cur.release()
		if err != nil {
			return nil, err
		}
		if absolute || end <= must {
			must = len(to) + max(must-end, 0)
		} else {
			must = 0
		}
		name = strings.TrimPrefix(to+name[end:], "/")
		if len(name) > maxPath {
			return nil, &refusal{reason: "its path", err: unix.ENAMETOOLONG}
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

// step opens one name below a directory. It gives a directory, or the target of a symbolic link, or an error.
func (t *tree) step(at *dir, base string, create bool) (*dir, string, error) {
	for {
		fd, err := unix.Openat(at.fd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		switch {
		case err == nil:
			return t.adopt(fd, at.join(base)), "", nil
		case err == unix.EINTR:
		case err == unix.ENOTDIR || err == unix.ELOOP:
			target, err := readlink(at.fd, base)
			if err == unix.EINVAL {
				return nil, "", refuse("its parent %q is no directory", at.join(base))
			}
			return nil, target, err
		case err == unix.ENOENT:
			key := pathKey{at.path, base}
			if err := t.arrive(key); err != nil {
				return nil, "", err
			}
			if !create {
				// What arrived is a file, or nothing did: either way this is no directory.
				return nil, "", unix.ENOENT
			}
			if err := t.implied(key); err != nil {
				return nil, "", err
			}
			if err := makeDir(at.fd, base, 0o755); err != nil && err != unix.EEXIST {
				return nil, "", refuseErrno("make directory", err)
			}
		default:
			return nil, "", refuseErrno("open directory", err)
		}
	}
}

func readlink(fd int, base string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, base, buf)
	if err != nil {
		return "", err
	}
	if n == len(buf) {
		return "", unix.ENAMETOOLONG
	}
	return string(buf[:n]), nil
}

// makeDir makes a directory with exactly this mode, whatever the umask.
func makeDir(fd int, base string, mode uint32) error {
	if err := unix.Mkdirat(fd, base, mode); err != nil {
		return err
	}
	return unix.Fchmodat(fd, base, mode, 0)
}
