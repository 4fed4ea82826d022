package layer

import (
	"bytes"
	"hash/maphash"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	nodeChunk = 4096    // nodes that are allocated together
	nameChunk = 1 << 16 // bytes of names that are allocated together
	// nodeBytes is what names takes for a node beside its name: the node, and its part of a hash table that is half full and
	// was copied when it grew.
	nodeBytes = 20 + 24
	// dirBytes is what it takes for a directory on top.
	dirBytes = 320
)

// nodeID is a node of names; 0 is none.
type nodeID uint32

const rootNode nodeID = 1

// node is a name in a directory. There are as many as the layer has entries, so it holds no pointers.
type node struct {
	text   uint32 // where its name is
	parent nodeID
	next   nodeID // in the list of the parent's entries
	ref    uint32 // of a directory: its index; otherwise the slot of its inode, high part in hi
	hi     uint16
	length uint8
	kind   uint8 // an S_IFMT, shifted to the right by 12; 0 if it was taken away
}

// dirNode is what is known of a directory until the end.
type dirNode struct {
	meta     meta
	first    nodeID
	implicit bool
	opaque   bool

	// Set when it has its place.
	slot   uint64 // of its inode
	size   int64
	start  uint32 // first block of its content
	inline bool   // what is left of the last block is beside the inode
	xattrs []byte // encoded
}

// names is the tree of an image in the making: all its names, with where their inodes are. It takes nodeBytes and the name for
// an entry, and dirBytes more for a directory.
type names struct {
	nodes   [][]node
	count   uint32
	text    [][]byte
	dirs    []*dirNode
	targets map[nodeID]string // of symbolic links

	seed  maphash.Seed
	table []nodeID // open addressing

	lastName string // the path that was resolved last, and where it led
	last     nodeID

	// implied is told of every directory that is made because a path needs it.
	implied func(at nodeID, base string) error
	// charge is told what more memory is used.
	charge func(bytes int64) error
}

func newNames() *names {
	t := &names{targets: map[nodeID]string{}, seed: maphash.MakeSeed(), table: make([]nodeID, 1024), nodes: [][]node{nil}}
	t.nodes[0] = make([]node, 1, nodeChunk) // so that no node is 0
	t.count = 1
	root := t.new()
	*t.at(root) = node{parent: root, kind: unix.S_IFDIR >> 12}
	t.addDir(root, meta{mode: 0o755})
	return t
}

func (t *names) at(id nodeID) *node { return &t.nodes[id/nodeChunk][id%nodeChunk] }

func (t *names) dir(id nodeID) *dirNode { return t.dirs[t.at(id).ref] }

func (t *names) name(id nodeID) []byte {
	n := t.at(id)
	return t.text[n.text/nameChunk][n.text%nameChunk:][:n.length]
}

func (n *node) slot() uint64        { return uint64(n.hi)<<32 | uint64(n.ref) }
func (n *node) setSlot(slot uint64) { n.hi, n.ref = uint16(slot>>32), uint32(slot) }
func (n *node) mode() uint32        { return uint32(n.kind) << 12 }

func (t *names) new() nodeID {
	last := len(t.nodes) - 1
	if len(t.nodes[last]) == nodeChunk {
		t.nodes = append(t.nodes, make([]node, 0, nodeChunk))
		last++
	}
	t.nodes[last] = append(t.nodes[last], node{})
	t.count++
	return nodeID(t.count - 1)
}

func (t *names) hash(parent nodeID, name string) uint64 {
	return maphash.String(t.seed, name) + uint64(parent)*0x9e3779b97f4a7c15
}

// find gives the node of a name, also if it was taken away, or 0.
func (t *names) find(parent nodeID, name string) nodeID {
	mask := uint64(len(t.table) - 1)
	for i := t.hash(parent, name); ; i++ {
		id := t.table[i&mask]
		if id == 0 {
			return 0
		}
		if t.at(id).parent == parent && string(t.name(id)) == name {
			return id
		}
	}
}

// get gives the node of a name that is there, or 0.
func (t *names) get(parent nodeID, name string) nodeID {
	if id := t.find(parent, name); id != 0 && t.at(id).kind != 0 {
		return id
	}
	return 0
}

// put makes a node of a name that is not there; what kind it is to be is the caller's to say. A node that went away with a
// directory is in no list any more, and comes back if its name does.
func (t *names) put(parent nodeID, name string) (nodeID, error) {
	if len(name) > unix.NAME_MAX {
		return 0, &refusal{reason: "its name", err: unix.ENAMETOOLONG}
	}
	if err := t.charge(nodeBytes + int64(len(name))); err != nil {
		return 0, err
	}
	id := t.find(parent, name)
	if id == 0 {
		if 2*int(t.count) > len(t.table) {
			t.grow()
		}
		id = t.new()
		n := t.at(id)
		n.parent, n.length, n.text = parent, uint8(len(name)), t.keep(name)
		t.insert(id, name)
	}
	d := t.dir(parent)
	t.at(id).next, d.first = d.first, id
	return id, nil
}

func (t *names) keep(name string) uint32 {
	last := len(t.text) - 1
	if last < 0 || len(t.text[last])+len(name) > nameChunk {
		t.text = append(t.text, make([]byte, 0, nameChunk))
		last++
	}
	at := last*nameChunk + len(t.text[last])
	t.text[last] = append(t.text[last], name...)
	return uint32(at)
}

func (t *names) insert(id nodeID, name string) {
	mask := uint64(len(t.table) - 1)
	i := t.hash(t.at(id).parent, name)
	for t.table[i&mask] != 0 {
		i++
	}
	t.table[i&mask] = id
}

func (t *names) grow() {
	t.table = make([]nodeID, 2*len(t.table))
	for id := rootNode + 1; id < nodeID(t.count); id++ {
		t.insert(id, string(t.name(id)))
	}
}

// addDir makes a node that was put a directory.
func (t *names) addDir(id nodeID, m meta) *dirNode {
	n := t.at(id)
	n.kind, n.ref = unix.S_IFDIR>>12, uint32(len(t.dirs))
	d := &dirNode{meta: m}
	t.dirs = append(t.dirs, d)
	return d
}

// entries are the names in a directory, in the order of their list.
func (t *names) entries(id nodeID) []nodeID {
	var out []nodeID
	for e := t.dir(id).first; e != 0; e = t.at(e).next {
		if t.at(e).kind != 0 {
			out = append(out, e)
		}
	}
	return out
}

// sort brings a directory's list into the order of the names.
func (t *names) sort(id nodeID) (entries []nodeID) {
	entries = t.entries(id)
	slices.SortFunc(entries, func(a, b nodeID) int { return bytes.Compare(t.name(a), t.name(b)) })
	next := nodeID(0)
	for _, e := range slices.Backward(entries) {
		n := t.at(e)
		n.next, next = next, e
	}
	t.dir(id).first = next
	return entries
}

// The rest makes names a walker.

func (t *names) lookup(name string, mode missing) (nodeID, error) { return resolve(t, name, mode) }

func (t *names) start(name string) (nodeID, int) {
	if rest, ok := strings.CutPrefix(name, t.lastName); t.last != 0 && ok && (rest == "" || rest[0] == '/') {
		return t.last, len(t.lastName)
	}
	return rootNode, 0
}

func (t *names) remember(name string, id nodeID) { t.lastName, t.last = name, id }
func (t *names) forget()                         { t.last = 0 }
func (t *names) drop(nodeID)                     {}

func (t *names) place(id nodeID) string {
	var parts [][]byte
	for ; id != rootNode; id = t.at(id).parent {
		parts = append(parts, t.name(id))
	}
	slices.Reverse(parts)
	return string(bytes.Join(parts, []byte("/")))
}

func (t *names) step(at nodeID, base string, create bool) (nodeID, string, error) {
	id := t.get(at, base)
	switch {
	case id == 0 && !create:
		if len(base) > unix.NAME_MAX {
			return 0, "", &refusal{reason: "open directory", err: unix.ENAMETOOLONG}
		}
		return 0, "", unix.ENOENT
	case id == 0:
		if err := t.implied(at, base); err != nil {
			return 0, "", err
		}
		return t.get(at, base), "", nil
	case t.at(id).mode() == unix.S_IFDIR:
		return id, "", nil
	case t.at(id).mode() == unix.S_IFLNK:
		return 0, t.targets[id], nil
	}
	return 0, "", refuse("its parent %q is no directory", t.place(id))
}
