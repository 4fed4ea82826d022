package trace

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// The methods, as Tracer.Method and Trace.Method name them.
const (
	EBPF     = "ebpf"
	EBPFCold = "ebpf-cold" // eBPF on a kernel that tells only of what comes into memory
	Fanotify = "fanotify"
)

// ErrUnsupported is that nothing can be recorded on this host; the error that wraps it says why, for each method.
var ErrUnsupported = errors.New("tracing of reads is not supported")

// Access is a part of a regular file, in whole pages, that was needed.
type Access struct {
	Device, Inode  uint64 // as stat has them
	Offset, Length int64  // bytes; the last page may go beyond the end of the file
	Ready          bool   // it was needed only after Recording.Ready
}

// Trace is what was recorded.
type Trace struct {
	Accesses []Access // in order of first need; no page twice
	Lost     uint64   // events of which nothing is known but that they were
	Method   string
}

// Tracer records. It is safe for concurrent use.
type Tracer struct {
	method method

	mu         sync.Mutex // guards what follows, and is held while a recording begins
	closed     bool
	recordings map[*Recording]struct{}
}

// method is a way to record.
type method interface {
	name() string
	// begin records into c until the end of what it returns.
	begin(groups []group, roots []root, c *collector) (recorder, error)
	// close gives back what is kept between recordings, of which there is none.
	close() error
}

// recorder is a recording that goes on.
type recorder interface {
	// becameReady comes after the collector knows of it.
	becameReady()
	// end waits for what has happened up to now, gives back everything, and says what was lost. It is called once.
	end() (lost uint64, err error)
}

// New finds out how to record on this host: by the first of methods that can be had, of EBPF and Fanotify if none are given. The
// error is ErrUnsupported with the reasons; the caller tells it, once.
func New(log *slog.Logger, methods ...string) (*Tracer, error) {
	if len(methods) == 0 {
		methods = []string{EBPF, Fanotify}
	}
	reasons := []error{ErrUnsupported}
	for _, name := range methods {
		open, ok := openers[name]
		if !ok {
			reasons = append(reasons, fmt.Errorf("%s: no such method", name))
			continue
		}
		m, err := open()
		if err != nil {
			reasons = append(reasons, fmt.Errorf("%s: %w", name, err))
			continue
		}
		if len(reasons) > 1 {
			log.Info("reads are traced by another method", "method", m.name(), "reason", errors.Join(reasons[1:]...))
		}
		return &Tracer{method: m, recordings: map[*Recording]struct{}{}}, nil
	}
	return nil, errors.Join(reasons...)
}

var openers = map[string]func() (method, error){EBPF: openEBPF, Fanotify: openFanotify}

// Method is how it records.
func (t *Tracer) Method() string { return t.method.name() }

// Close ends what is still recorded; its End returns what there was until now.
func (t *Tracer) Close() error {
	t.mu.Lock()
	again := t.closed
	t.closed = true
	open := slices.Collect(maps.Keys(t.recordings))
	t.mu.Unlock()
	if again {
		return nil
	}
	var errs []error
	for _, r := range open {
		r.stop()
		errs = append(errs, r.err)
	}
	return errors.Join(append(errs, t.method.close())...)
}

// ErrClosed is returned by Begin after Close.
var ErrClosed = errors.New("tracer is closed")

// Begin records what processes in the cgroups, and below them, need of regular files on the file systems of the roots. A cgroup is
// named by its directory, in version 2 or in a hierarchy of version 1 that has a controller; of several hierarchies' directories
// for the same cgroup, the first counts. The caller must call End.
func (t *Tracer) Begin(cgroups, roots []string) (*Recording, error) {
	groups, err := findGroups(cgroups)
	if err != nil {
		return nil, fmt.Errorf("trace reads: %w", err)
	}
	trees, err := findRoots(roots)
	if err != nil {
		return nil, fmt.Errorf("trace reads: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, fmt.Errorf("trace reads: %w", ErrClosed)
	}
	r := &Recording{tracer: t, collector: newCollector(trees)}
	if r.recorder, err = t.method.begin(groups, trees, r.collector); err != nil {
		return nil, fmt.Errorf("trace reads: %w", err)
	}
	t.recordings[r] = struct{}{}
	return r, nil
}

// Recording goes on until End. It is safe for concurrent use.
type Recording struct {
	tracer    *Tracer
	collector *collector
	recorder  recorder

	mu    sync.Mutex // guards what follows, and is held while it ends
	ended bool
	lost  uint64
	err   error
}

// Ready marks the moment from which on accesses are told as Ready. Only the first call counts.
func (r *Recording) Ready() {
	r.collector.ready()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ended {
		r.recorder.becameReady()
	}
}

// End gives back what the recording took, and returns it. An error says that something was not given back or not read; the trace is
// then what there is. Every call returns the same.
func (r *Recording) End() (Trace, error) {
	r.stop()
	accesses, dropped := r.collector.result()
	t := Trace{Accesses: accesses, Lost: r.lost + dropped, Method: r.tracer.Method()}
	if r.err != nil {
		return t, fmt.Errorf("end trace of reads: %w", r.err)
	}
	return t, nil
}

func (r *Recording) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return
	}
	r.ended = true
	r.lost, r.err = r.recorder.end()
	r.tracer.mu.Lock()
	defer r.tracer.mu.Unlock()
	delete(r.tracer.recordings, r)
}

// root is the tree of a layer.
type root struct {
	path   string
	device uint64
}

// maxRoots is more than any image has layers.
const maxRoots = 1024

func findRoots(paths []string) ([]root, error) {
	if len(paths) == 0 || len(paths) > maxRoots {
		return nil, fmt.Errorf("%d roots, not 1 to %d", len(paths), maxRoots)
	}
	var roots []root
	for _, path := range paths {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return nil, &os.PathError{Op: "stat", Path: path, Err: err}
		}
		roots = append(roots, root{path, st.Dev})
	}
	return roots, nil
}

// devices of the roots, each once.
func devices(roots []root) []uint64 {
	var out []uint64
	for _, r := range roots {
		if !slices.Contains(out, r.device) {
			out = append(out, r.device)
		}
	}
	return out
}
