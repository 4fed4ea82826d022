package pool

import (
	"errors"
	"fmt"
)

// CheckIndex compares the index with what there is.
func CheckIndex(m *Manager) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	size := func(x index) (n int) {
		for _, s := range x.functions {
			n += len(s)
		}
		for _, s := range x.nodes {
			n += len(s)
		}
		for _, s := range x.groups {
			n += len(s)
		}
		for _, s := range x.spare {
			n += len(s)
		}
		return n + len(x.frozen) + len(x.restless) + len(x.outdated)
	}
	had := size(m.index)
	fresh := newIndex()
	m.index = fresh
	for _, i := range m.instances {
		was := i.at
		i.at = position{}
		m.place(i)
		if i.at != was {
			errs = append(errs, fmt.Errorf("instance %s was at %+v and belongs to %+v", i.id, was, i.at))
		}
	}
	if has := size(m.index); had != has {
		errs = append(errs, fmt.Errorf("the index had %d entries, and should have had %d", had, has))
	}
	return errors.Join(errs...)
}

// NewsDelay is how long gateways hear of a change after it.
const NewsDelay = newsDelay
