package bpf

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

const (
	// seenEntries is how many words of 64 pages are remembered as told: 16 GiB of files, in some 2 MiB of the kernel's memory.
	seenEntries = 16384
	// watchedEntries bounds the cgroups, and the devices, that are watched at once.
	watchedEntries = 4096
)

// Unified is the hierarchy of cgroup version 2.
const Unified = ""

// PageProbe knows how pages that come into the page cache, or are found there, may be watched on this kernel. It holds nothing
// in the kernel. It is safe for concurrent use.
type PageProbe struct {
	layout pageLayout
	hooks  []pageHook
}

// NewPageProbe reads the kernel's BTF, and makes sure that the programs load and attach.
func NewPageProbe() (*PageProbe, error) {
	_ = rlimit.RemoveMemlock() // before Linux 5.11 maps count as locked memory; if that is too little, what follows says so
	layout, hooks, err := findPages()
	if err != nil {
		return nil, fmt.Errorf("read kernel BTF: %w", err)
	}
	p := &PageProbe{layout: layout, hooks: hooks}
	w, err := p.Watch(Unified, ringBytes, func(PageAccess) {})
	if err != nil {
		return nil, err
	}
	err = w.Add(0, nil) // a cgroup that is none
	return p, errors.Join(err, w.Close())
}

// SeesCached says whether pages are told of that were in memory already; before Linux 6.11 or so only those are that are read
// from disk.
func (p *PageProbe) SeesCached() bool { return len(p.hooks) > 1 }

// Controller finds the hierarchy of version 1 that has any of the controllers, named as the options of its mount name them.
func (p *PageProbe) Controller(names []string) (hierarchy string, ok bool) {
	for _, name := range names {
		if _, ok := p.layout.controllers[name]; ok {
			return name, true
		}
	}
	return "", false
}

// PageAccess is one event: a process of a watched cgroup, or of one up to three levels below it, needed pages of a regular file.
type PageAccess struct {
	Cgroup uint64 // the watched one
	Device uint64 // of the file system, as stat encodes it
	Inode  uint64
	Page   uint64 // the first
	Pages  uint64 // at least one; no more than the file has
	At     int64  // ns of CLOCK_MONOTONIC
}

// PageWatcher tells what processes of watched cgroups of one hierarchy need of files on watched devices. Its programs are attached
// while it has a cgroup to watch. Loading them takes some 5 ms, attaching them less than one: so they stay loaded until Close, with
// maps of some 3 MiB. It is safe for concurrent use.
type PageWatcher struct {
	maps   pageMaps
	hooks  []pageHook
	progs  []*ebpf.Program // of the hooks
	reader *ringbuf.Reader
	each   func(PageAccess)

	flushing sync.Mutex // held by the one who awaits flushed
	flushed  chan struct{}
	ended    chan struct{} // closed when nothing is read any more; err is set by then
	err      error

	mu         sync.Mutex  // guards what follows
	links      []link.Link // while there are cgroups
	generation uint64
	cgroups    map[uint64]int // how often each was added
	devices    map[uint64]int
}

// Watch loads the programs, for cgroups of one hierarchy: Unified, or what Controller found. each is called from one goroutine,
// in the order of the events, some time after them: see Flush. Events that do not fit into the buffer, of a power of two, are
// counted: see Lost.
func (p *PageProbe) Watch(hierarchy string, buffer uint32, each func(PageAccess)) (_ *PageWatcher, err error) {
	w := &PageWatcher{
		hooks: p.hooks, each: each, flushed: make(chan struct{}), ended: make(chan struct{}),
		cgroups: map[uint64]int{}, devices: map[uint64]int{},
	}
	defer func() {
		if err != nil {
			_ = w.free()
		}
	}()
	if err := w.makeMaps(buffer); err != nil {
		return nil, err
	}
	for _, h := range p.hooks {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: pagesName, Type: ebpf.RawTracepoint, License: "Dual BSD/GPL",
			Instructions: p.layout.program(h, hierarchy, w.maps),
		})
		if err != nil {
			return nil, fmt.Errorf("load program for %s: %w", h.tracepoint, err)
		}
		w.progs = append(w.progs, prog)
	}
	if w.reader, err = ringbuf.NewReader(w.maps.ring); err != nil {
		return nil, fmt.Errorf("open ring buffer: %w", err)
	}
	go w.read()
	return w, nil
}

func (w *PageWatcher) makeMaps(buffer uint32) error {
	for _, m := range []struct {
		to   **ebpf.Map
		spec ebpf.MapSpec
	}{
		{&w.maps.ring, ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: buffer}},
		{&w.maps.cgroups, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: watchedEntries, Flags: unix.BPF_F_NO_PREALLOC}},
		{&w.maps.devices, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 1, MaxEntries: watchedEntries, Flags: unix.BPF_F_NO_PREALLOC}},
		{&w.maps.lost, ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: watchedEntries, Flags: unix.BPF_F_NO_PREALLOC}},
		{&w.maps.seen, ebpf.MapSpec{Type: ebpf.LRUHash, KeySize: seenKeyBytes, ValueSize: 8, MaxEntries: seenEntries}},
	} {
		m.spec.Name = pagesName
		made, err := ebpf.NewMap(&m.spec)
		if err != nil {
			return fmt.Errorf("create map: %w", err)
		}
		*m.to = made
	}
	return nil
}

// attach and detach want w.mu.
func (w *PageWatcher) attach() error {
	for i, h := range w.hooks {
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: h.tracepoint, Program: w.progs[i]})
		if err != nil {
			return errors.Join(fmt.Errorf("attach to %s: %w", h.tracepoint, err), w.detach())
		}
		w.links = append(w.links, l)
	}
	return nil
}

func (w *PageWatcher) detach() error {
	var errs []error
	for _, l := range w.links {
		errs = append(errs, l.Close())
	}
	w.links = nil
	return errors.Join(errs...)
}

// free gives back what was made.
func (w *PageWatcher) free() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	errs := []error{w.detach()}
	if w.reader != nil {
		errs = append(errs, w.reader.Close())
	}
	for _, p := range w.progs {
		errs = append(errs, p.Close())
	}
	for _, m := range []*ebpf.Map{w.maps.ring, w.maps.cgroups, w.maps.devices, w.maps.lost, w.maps.seen} {
		errs = append(errs, m.Close()) // of nil, nothing
	}
	return errors.Join(errs...)
}

// Close detaches the programs and frees everything; each is not called after it.
func (w *PageWatcher) Close() error {
	err := w.reader.Close()
	<-w.ended
	return errors.Join(err, w.free())
}

// Add watches a cgroup, by the inode number of its directory, on devices as stat encodes them. What it needed before is told
// again if it needs it again, also to those who added it before. Every Add wants a Remove.
func (w *PageWatcher) Add(cgroup uint64, devices []uint64) (err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("watch cgroup: %w", err), w.remove(cgroup, devices))
		}
	}()
	for _, device := range devices {
		w.devices[device]++
	}
	if w.cgroups[cgroup]++; w.cgroups[cgroup] == 1 {
		if err := w.maps.lost.Put(cgroup, uint64(0)); err != nil {
			return err
		}
	}
	for _, device := range devices {
		if err := w.maps.devices.Put(kernelDevice(device), byte(1)); err != nil {
			return err
		}
	}
	w.generation++
	if err := w.maps.cgroups.Put(cgroup, w.generation); err != nil {
		return err
	}
	if w.links == nil {
		return w.attach()
	}
	return nil
}

// Remove undoes one Add.
func (w *PageWatcher) Remove(cgroup uint64, devices []uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.remove(cgroup, devices)
}

// remove wants w.mu. That a map does not have what is deleted from it can only be after an Add that failed.
func (w *PageWatcher) remove(cgroup uint64, devices []uint64) error {
	if w.cgroups[cgroup]--; w.cgroups[cgroup] <= 0 {
		delete(w.cgroups, cgroup)
		_ = w.maps.cgroups.Delete(cgroup)
		_ = w.maps.lost.Delete(cgroup)
	}
	for _, device := range devices {
		if w.devices[device]--; w.devices[device] <= 0 {
			delete(w.devices, device)
			_ = w.maps.devices.Delete(kernelDevice(device))
		}
	}
	if len(w.cgroups) == 0 {
		return w.detach()
	}
	return nil
}

// Lost is how many events of a watched cgroup did not fit into the buffer since it was first added.
func (w *PageWatcher) Lost(cgroup uint64) (uint64, error) {
	var lost uint64
	if err := w.maps.lost.Lookup(cgroup, &lost); err != nil {
		return 0, fmt.Errorf("count of lost events: %w", err)
	}
	return lost, nil
}

// Flush returns when each was called for all events up to now. The kernel wakes the reader only when the buffer is filled by a
// quarter: being woken for each event would cost the watched more than all the rest.
func (w *PageWatcher) Flush() error {
	w.flushing.Lock()
	defer w.flushing.Unlock()
	if err := w.reader.Flush(); err != nil {
		return fmt.Errorf("flush ring buffer: %w", err)
	}
	select {
	case <-w.flushed:
		return nil
	case <-w.ended:
		return fmt.Errorf("flush ring buffer: %w", w.err)
	}
}

// read hands events over until the reader is closed.
func (w *PageWatcher) read() {
	defer close(w.ended)
	var record ringbuf.Record
	for {
		switch err := w.reader.ReadInto(&record); {
		case errors.Is(err, ringbuf.ErrFlushed):
			w.flushed <- struct{}{} // awaited by Flush, and by nobody else
		case err != nil:
			w.err = err
			return
		default:
			if a, err := decodePage(record.RawSample); err == nil {
				w.each(a)
			}
		}
	}
}

// kernelDevice is stat's device number as the kernel itself keeps it.
func kernelDevice(device uint64) uint32 { return unix.Major(device)<<20 | unix.Minor(device) }

func statDevice(device uint32) uint64 { return unix.Mkdev(device>>20, device&(1<<20-1)) }
