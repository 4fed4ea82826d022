package pool

import (
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// set of Instances.
type set map[*instance]struct{}

// place is where spare Instances of a kind are.
type place struct {
	node string
	kind kind
}

// shops has the spare Instances by kind, and then by node: where there are none, nobody looks at any node.
type shops map[kind]map[string]set

func (s shops) at(p place) set { return s[p.kind][p.node] }

// put moves an Instance in or out.
func (s shops) put(p place, i *instance, in bool) {
	if in {
		if s[p.kind] == nil {
			s[p.kind] = map[string]set{}
		}
		if s[p.kind][p.node] == nil {
			s[p.kind][p.node] = set{}
		}
		s[p.kind][p.node][i] = struct{}{}
		return
	}
	if delete(s.at(p), i); len(s.at(p)) > 0 {
		return
	}
	if delete(s[p.kind], p.node); len(s[p.kind]) == 0 {
		delete(s, p.kind)
	}
}

// position says which sets of the index an Instance is in. It follows from the Instance and its Function alone.
type position struct {
	function string // whose it is, or is about to be
	group    group  // likewise
	spare    place
	node     string
	isSpare  bool
	frozen   bool
	restless bool // something is under way with it, or it has an end
	outdated bool // it serves a Revision that was replaced
}

// index finds Instances without looking at all of them: most stand still while a few are claimed. Whoever changes an Instance calls
// Manager.place afterwards. Guarded by Manager.mu.
type index struct {
	functions, nodes           map[string]set
	groups                     map[group]set
	spare                      shops
	frozen, restless, outdated set
}

func newIndex() index {
	return index{functions: map[string]set{}, nodes: map[string]set{}, groups: map[group]set{}, spare: shops{}, frozen: set{}, restless: set{}, outdated: set{}}
}

// position of an Instance that is known; the zero value is that of one that is not.
func (m *Manager) position(i *instance) position {
	if m.instances[i.id] != i {
		return position{}
	}
	p := position{restless: i.restless(), node: i.node}
	if i.state == hearthv1.State_STATE_GONE {
		return p
	}
	if p.function = i.function; p.function == "" && i.by != nil {
		p.function = i.by.function
	}
	if p.group = i.group; p.group == (group{}) && i.by != nil {
		if f := m.functions[i.by.function]; f != nil {
			p.group = groupOf(f.spec)
		}
	}
	if p.isSpare = i.spare(); p.isSpare {
		p.spare = place{i.node, i.kind}
	}
	p.frozen = i.state == hearthv1.State_STATE_FROZEN
	f := m.functions[i.function]
	p.outdated = f != nil && i.routable() && i.revision != f.revision.GetName()
	return p
}

// place brings the index up to date with an Instance.
func (m *Manager) place(i *instance) {
	to := m.position(i)
	m.unsettle(m.nodes[i.node])
	m.miss(i.at.function)
	m.miss(to.function)
	if to == i.at {
		return
	}
	x := &m.index
	move(x.functions, i.at.function, to.function, i.at.function != "", to.function != "", i)
	move(x.nodes, i.at.node, to.node, i.at.node != "", to.node != "", i)
	move(x.groups, i.at.group, to.group, i.at.group != (group{}), to.group != (group{}), i)
	if i.at.isSpare {
		x.spare.put(i.at.spare, i, false)
	}
	if to.isSpare {
		x.spare.put(to.spare, i, true)
	}
	x.frozen.put(i, to.frozen)
	x.restless.put(i, to.restless)
	x.outdated.put(i, to.outdated)
	i.at = to
}

func (s set) put(i *instance, in bool) {
	if in {
		s[i] = struct{}{}
		return
	}
	delete(s, i)
}

func move[K comparable](sets map[K]set, from, to K, was, is bool, i *instance) {
	if was {
		if delete(sets[from], i); len(sets[from]) == 0 {
			delete(sets, from)
		}
	}
	if is {
		if sets[to] == nil {
			sets[to] = set{}
		}
		sets[to][i] = struct{}{}
	}
}

// add takes in a new Instance.
func (m *Manager) add(i *instance) {
	m.instances[i.id] = i
	m.place(i)
}

// drop forgets one.
func (m *Manager) drop(i *instance) {
	delete(m.instances, i.id)
	m.place(i)
}
