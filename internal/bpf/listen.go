package bpf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
)

// ringBytes is the size of the buffer between kernel and reader: some 1,300 listens that are not yet read. One that does not
// fit is dropped, which is why a caller has to look for itself now and then.
const ringBytes = 64 << 10

// expectBuffer is how many addresses one expectation may hold unread: a process listens on one or two.
const expectBuffer = 8

// ListenWatcher tells the moment at which a process begins to listen on a TCP port, by the network namespace it does so in.
// It is safe for concurrent use. Run has to be running for anything to be told.
type ListenWatcher struct {
	log    *slog.Logger
	events *ebpf.Map
	prog   *ebpf.Program
	hook   link.Link
	reader *ringbuf.Reader

	mu      sync.Mutex // guards waiting
	waiting map[place]map[*expectation]struct{}
}

// place is where a process is expected to listen.
type place struct {
	netns uint32
	port  uint16
}

type expectation struct{ told chan netip.Addr }

// Supported says why listens cannot be watched on this host, or nil. It loads and attaches the program and takes it away again.
func Supported() error {
	w, err := NewListenWatcher(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	return w.close()
}

// NewListenWatcher loads and attaches the program. The caller must call Run, which gives everything back at its end.
func NewListenWatcher(log *slog.Logger) (_ *ListenWatcher, err error) {
	w := &ListenWatcher{log: log, waiting: map[place]map[*expectation]struct{}{}}
	defer func() {
		if err != nil {
			_ = w.close()
		}
	}()
	fields, err := kernelFields()
	if err != nil {
		return nil, fmt.Errorf("read kernel BTF: %w", err)
	}
	w.events, err = ebpf.NewMap(&ebpf.MapSpec{Name: "hearth_listen", Type: ebpf.RingBuf, MaxEntries: ringBytes})
	if err != nil {
		return nil, fmt.Errorf("create ring buffer: %w", err)
	}
	w.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "hearth_listen", Type: ebpf.RawTracepoint, License: "Dual BSD/GPL",
		Instructions: listenProgram(w.events.FD(), fields),
	})
	if err != nil {
		return nil, fmt.Errorf("load listen program: %w", err)
	}
	w.hook, err = link.AttachRawTracepoint(link.RawTracepointOptions{Name: "inet_sock_set_state", Program: w.prog})
	if err != nil {
		return nil, fmt.Errorf("attach to inet_sock_set_state: %w", err)
	}
	w.reader, err = ringbuf.NewReader(w.events)
	if err != nil {
		return nil, fmt.Errorf("open ring buffer: %w", err)
	}
	return w, nil
}

// close gives back what NewListenWatcher took, as far as it got.
func (w *ListenWatcher) close() error {
	var errs []error
	if w.reader != nil {
		errs = append(errs, w.reader.Close())
	}
	if w.hook != nil {
		errs = append(errs, w.hook.Close())
	}
	if w.prog != nil {
		errs = append(errs, w.prog.Close())
	}
	if w.events != nil {
		errs = append(errs, w.events.Close())
	}
	return errors.Join(errs...)
}

// Expect asks to be told when a process in the network namespace (its inode number, as stat of /proc/PID/ns/net gives it)
// listens on port. It must be called before the process can do so. The channel gets the address that is listened on, which is
// unspecified for a socket bound to all; cancel ends the expectation and must be called.
func (w *ListenWatcher) Expect(netns uint64, port uint16) (told <-chan netip.Addr, cancel func()) {
	e := &expectation{told: make(chan netip.Addr, expectBuffer)}
	at := place{netns: uint32(netns), port: port} // the kernel's own number has 32 bits
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting[at] == nil {
		w.waiting[at] = map[*expectation]struct{}{}
	}
	w.waiting[at][e] = struct{}{}
	return e.told, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.waiting[at], e)
		if len(w.waiting[at]) == 0 {
			delete(w.waiting, at)
		}
	}
}

// Run reads what the kernel tells until ctx is done, then detaches the program and frees everything.
func (w *ListenWatcher) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = w.reader.Close() })
	defer func() {
		stop()
		if err := w.close(); err != nil {
			w.log.Warn("listen watcher did not close cleanly", "error", err)
		}
	}()
	var record ringbuf.Record
	for {
		err := w.reader.ReadInto(&record)
		if errors.Is(err, ringbuf.ErrClosed) || errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read ring buffer: %w", err)
		}
		event, err := decode(record.RawSample)
		if err != nil {
			w.log.Warn("listen record not understood", "error", err)
			continue
		}
		w.tell(event)
	}
}

// tell passes a listen on to those who expect it; one that has not read its last eight gets no more.
func (w *ListenWatcher) tell(l listen) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for e := range w.waiting[l.at] {
		select {
		case e.told <- l.address:
		default:
		}
	}
}
