package layer

import (
	"container/list"
	"fmt"
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

// lookup gives the directory at name, as resolve does. The caller releases what it gets.
func (t *tree) lookup(name string, mode missing) (*dir, error) { return resolve(t, name, mode) }

func (t *tree) place(d *dir) string { return d.path }
func (t *tree) drop(d *dir)         { d.release() }

// step opens one name below a directory.
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
			var st unix.Stat_t
			if unix.Fstatat(at.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
				continue // it arrived
			}
			if !create {
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
