package trace

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/hearth-serverless/hearth/internal/bpf"
)

// bufferBytes is room for some 9,000 events that are not yet read: more than most starts have.
const bufferBytes = 512 << 10

// pages records by eBPF. All recordings of a hierarchy of cgroups share one set of programs; there are as many sets as
// hierarchies that are recorded in, which on one host is one. A set stays loaded once it is, and is attached while it is used.
type pages struct {
	probe  *bpf.PageProbe
	buffer uint32

	mu      sync.Mutex // guards what follows; held while programs are loaded and attached, which is no I/O
	watches map[string]*watch
}

// watch is one set of programs, and who listens to it.
type watch struct {
	watcher *bpf.PageWatcher

	mu        sync.Mutex // guards listeners
	listeners map[uint64][]*collector
}

func openEBPF() (method, error) {
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

func (p *pages) begin(groups []group, _ []root, c *collector) (recorder, error) {
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
	return &pageRecorder{p, added, c}, nil
}

// pageRecorder is a recording by eBPF.
type pageRecorder struct {
	pages     *pages
	added     []watched
	collector *collector
}

func (r *pageRecorder) becameReady() {} // events say when they were

// add begins with one cgroup; it wants p.mu.
func (p *pages) add(g group, c *collector) (watched, error) {
	at := watched{hierarchy: bpf.Unified, id: g.id}
	if len(g.controllers) > 0 {
		var ok bool
		if at.hierarchy, ok = p.probe.Controller(g.controllers); !ok {
			return at, fmt.Errorf("the hierarchy of cgroup %s has no controller by which eBPF could find it", g.path)
		}
	}
	w, err := p.watch(at.hierarchy)
	if err != nil {
		return at, err
	}
	w.listen(at.id, c)
	if err := w.watcher.Add(at.id, c.devices); err != nil {
		w.ignore(at.id, c)
		return at, err
	}
	if at.lostBefore, err = w.watcher.Lost(at.id); err != nil {
		_, undone := p.remove([]watched{at}, c)
		return at, errors.Join(err, undone)
	}
	return at, nil
}

func (r *pageRecorder) end() (uint64, error) {
	var errs []error
	flushed := map[string]bool{}
	for _, at := range r.added {
		if !flushed[at.hierarchy] {
			flushed[at.hierarchy] = true
			r.pages.mu.Lock()
			w := r.pages.watches[at.hierarchy]
			r.pages.mu.Unlock()
			errs = append(errs, w.watcher.Flush())
		}
	}
	r.pages.mu.Lock()
	defer r.pages.mu.Unlock()
	lost, err := r.pages.remove(r.added, r.collector)
	return lost, errors.Join(append(errs, err)...)
}

// remove undoes add, and says what was lost meanwhile; it wants p.mu.
func (p *pages) remove(added []watched, c *collector) (lost uint64, err error) {
	var errs []error
	for _, at := range added {
		w := p.watches[at.hierarchy]
		w.ignore(at.id, c)
		now, err := w.watcher.Lost(at.id)
		if err == nil {
			lost += now - at.lostBefore
		}
		errs = append(errs, err, w.watcher.Remove(at.id, c.devices))
	}
	return lost, errors.Join(errs...)
}

// watch has the programs for a hierarchy; it wants p.mu.
func (p *pages) watch(hierarchy string) (*watch, error) {
	w, ok := p.watches[hierarchy]
	if !ok {
		w = &watch{listeners: map[uint64][]*collector{}}
		var err error
		if w.watcher, err = p.probe.Watch(hierarchy, p.buffer, w.tell); err != nil {
			return nil, err
		}
		p.watches[hierarchy] = w
	}
	return w, nil
}

func (p *pages) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for hierarchy, w := range p.watches {
		errs = append(errs, w.watcher.Close())
		delete(p.watches, hierarchy)
	}
	return errors.Join(errs...)
}

func (w *watch) listen(cgroup uint64, c *collector) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listeners[cgroup] = append(w.listeners[cgroup], c)
}

func (w *watch) ignore(cgroup uint64, c *collector) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listeners[cgroup] = slices.DeleteFunc(w.listeners[cgroup], func(other *collector) bool { return other == c })
	if len(w.listeners[cgroup]) == 0 {
		delete(w.listeners, cgroup)
	}
}

// tell hands an event to those who listen.
func (w *watch) tell(a bpf.PageAccess) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.listeners[a.Cgroup] {
		c.add(a.Device, a.Inode, a.Page, a.Pages, a.At)
	}
}
