package trace

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/hearth-serverless/hearth/internal/bpf"
)

// bufferBytes is room for some 9,000 events that are not yet read: more than most starts have.
const bufferBytes = 512 << 10

// pages records by eBPF. All recordings of a hierarchy of cgroups share one set of programs; there are as many sets as
// hierarchies that are recorded in, which on one host is one.
type pages struct {
	probe  *bpf.PageProbe
	buffer uint32

	mu      sync.Mutex // guards what follows; held while programs are loaded, which is no I/O
	watches map[string]*watch
}

// watch is one set of programs, and who listens to it.
type watch struct {
	watcher *bpf.PageWatcher
	users   int // guarded by pages.mu

	mu        sync.Mutex // guards listeners
	listeners map[uint64][]*collector
}

func openEBPF(*slog.Logger) (method, error) {
	probe, err := bpf.NewPageProbe()
	if err != nil {
		return nil, err
	}
	return &pages{probe: probe, buffer: bufferBytes, watches: map[string]*watch{}}, nil
}

func (p *pages) name() string {
	if p.probe.SeesCached() {
		return EBPF
	}
	return EBPFCold
}

// watched is a cgroup that a recording has added to a watch.
type watched struct {
	hierarchy  string
	id         uint64
	lostBefore uint64
}

func (p *pages) begin(groups []group, _ []root, c *collector) (func() (uint64, error), error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var added []watched
	for _, g := range groups {
		w, err := p.add(g, c)
		if err != nil {
			_, undone := p.remove(added, c)
			return nil, errors.Join(err, undone)
		}
		added = append(added, w)
	}
	return func() (uint64, error) {
		return p.end(added, c)
	}, nil
}

// add begins with one cgroup; it wants p.mu.
func (p *pages) add(g group, c *collector) (watched, error) {
	at := watched{hierarchy: bpf.Unified, id: g.id}
	if len(g.controllers) > 0 {
		var ok bool
		if at.hierarchy, ok = p.probe.Controller(g.controllers); !ok {
			return at, fmt.Errorf("the hierarchy of cgroup %s has no controller by which eBPF could find it", g.path)
		}
	}
	w, err := p.use(at.hierarchy)
	if err != nil {
		return at, err
	}
	if err := w.watcher.Add(at.id, c.devices); err != nil {
		return at, errors.Join(err, p.release(at.hierarchy))
	}
	at.lostBefore, err = w.watcher.Lost(at.id)
	w.mu.Lock()
	w.listeners[at.id] = append(w.listeners[at.id], c)
	w.mu.Unlock()
	if err != nil {
		_, undone := p.remove([]watched{at}, c)
		return at, errors.Join(err, undone)
	}
	return at, nil
}

// end waits for what has happened, and removes a recording.
func (p *pages) end(added []watched, c *collector) (uint64, error) {
	var errs []error
	flushed := map[string]bool{}
	for _, at := range added {
		if !flushed[at.hierarchy] {
			flushed[at.hierarchy] = true
			p.mu.Lock()
			w := p.watches[at.hierarchy] // stays while added is not removed
			p.mu.Unlock()
			errs = append(errs, w.watcher.Flush())
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	lost, err := p.remove(added, c)
	return lost, errors.Join(append(errs, err)...)
}

// remove undoes add, and says what was lost meanwhile; it wants p.mu.
func (p *pages) remove(added []watched, c *collector) (lost uint64, err error) {
	var errs []error
	for _, at := range added {
		w := p.watches[at.hierarchy]
		w.mu.Lock()
		if i := slices.Index(w.listeners[at.id], c); i >= 0 {
			w.listeners[at.id] = slices.Delete(w.listeners[at.id], i, i+1)
		}
		if len(w.listeners[at.id]) == 0 {
			delete(w.listeners, at.id)
		}
		w.mu.Unlock()
		now, err := w.watcher.Lost(at.id)
		if err == nil {
			lost += now - at.lostBefore
		}
		errs = append(errs, err)
		w.watcher.Remove(at.id, c.devices)
		errs = append(errs, p.release(at.hierarchy))
	}
	return lost, errors.Join(errs...)
}

// use attaches the programs for a hierarchy, if they are not; it wants p.mu.
func (p *pages) use(hierarchy string) (*watch, error) {
	w, ok := p.watches[hierarchy]
	if !ok {
		w = &watch{listeners: map[uint64][]*collector{}}
		var err error
		if w.watcher, err = p.probe.Watch(hierarchy, p.buffer, w.tell); err != nil {
			return nil, err
		}
		p.watches[hierarchy] = w
	}
	w.users++
	return w, nil
}

// release undoes use; it wants p.mu.
func (p *pages) release(hierarchy string) error {
	w := p.watches[hierarchy]
	if w.users--; w.users > 0 {
		return nil
	}
	delete(p.watches, hierarchy)
	return w.watcher.Close()
}

// tell hands an event to those who listen.
func (w *watch) tell(a bpf.PageAccess) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.listeners[a.Cgroup] {
		c.add(a.Device, a.Inode, a.Page, a.Pages, a.At)
	}
}
