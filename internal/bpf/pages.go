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
	return p, w.Close()
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

// PageWatcher tells what processes of watched cgroups of one hierarchy need of files on watched devices. Its programs are
// attached from Watch to Close. It is safe for concurrent use.
type PageWatcher struct {
	maps   pageMaps
	owned  []interface{ Close() error } // in the order in which they were made
	reader *ringbuf.Reader
	each   func(PageAccess)

	flushing sync.Mutex // held by the one who awaits flushed
	flushed  chan struct{}
	ended    chan struct{} // closed when nothing is read any more; err is set by then
	err      error

	mu         sync.Mutex // guards what follows
	generation uint64
	cgroups    map[uint64]int // how often each was added
	devices    map[uint64]int
}

// Watch attaches the programs, for cgroups of one hierarchy: Unified, or what Controller found. each is called from one goroutine,
// in the order of the events, some time after them: see Flush. Events that do not fit into the buffer, of a power of two, are
// counted: see Lost.
func (p *PageProbe) Watch(hierarchy string, buffer uint32, each func(PageAccess)) (_ *PageWatcher, err error) {
	w := &PageWatcher{
		each: each, flushed: make(chan struct{}), ended: make(chan struct{}),
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
		w.owned = append(w.owned, prog)
		hook, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: h.tracepoint, Program: prog})
		if err != nil {
			return nil, fmt.Errorf("attach to %s: %w", h.tracepoint, err)
		}
		w.owned = append(w.owned, hook)
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
		w.owned = append(w.owned, made)
	}
	return nil
}

// free gives back what was made, last first.
func (w *PageWatcher) free() error {
	var errs []error
	if w.reader != nil {
		errs = append(errs, w.reader.Close())
	}
	for i := len(w.owned) - 1; i >= 0; i-- {
		errs = append(errs, w.owned[i].Close())
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
func (w *PageWatcher) Add(cgroup uint64, devices []uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cgroups[cgroup]++; w.cgroups[cgroup] == 1 {
		if err := w.maps.lost.Put(cgroup, uint64(0)); err != nil {
			w.remove(cgroup, nil)
			return fmt.Errorf("watch cgroup: %w", err)
		}
	}
	for i, device := range devices {
		w.devices[device]++
		if err := w.maps.devices.Put(kernelDevice(device), byte(1)); err != nil {
			w.remove(cgroup, devices[:i+1])
			return fmt.Errorf("watch device: %w", err)
		}
	}
	w.generation++
	if err := w.maps.cgroups.Put(cgroup, w.generation); err != nil {
		w.remove(cgroup, devices)
		return fmt.Errorf("watch cgroup: %w", err)
	}
	return nil
}

// Remove undoes one Add.
func (w *PageWatcher) Remove(cgroup uint64, devices []uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.remove(cgroup, devices)
}

// remove wants w.mu. That a map does not have what is deleted from it can only be after an Add that failed.
func (w *PageWatcher) remove(cgroup uint64, devices []uint64) {
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
