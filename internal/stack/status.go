package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"
)

// State of a deployment.
const (
	StateStarting = "starting"
	StateUp       = "up"
	StateStopping = "stopping"
)

// ErrDown says that no deployment runs where one was looked for.
var ErrDown = errors.New("no deployment is up")

// Status is what the supervisor writes into its Run folder for everybody to read.
type Status struct {
	Name     string    `json:"name"`
	State    string    `json:"state"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	Root     string    `json:"root"`
	Run      string    `json:"run"`
	Gateway  string    `json:"gateway"`
	Registry string    `json:"registry,omitempty"`
	Subnet   string    `json:"subnet"`
	PoolSize int       `json:"pool_size"`
	// Containerd is its version.
	Containerd string   `json:"containerd"`
	Daemons    []Daemon `json:"daemons"`
}

// Daemon is one child. PID is 0 while it is not running.
type Daemon struct {
	Name     string    `json:"name"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	Restarts int       `json:"restarts"`
	Error    string    `json:"error,omitempty"` // why it last ended
	Log      string    `json:"log"`
	Admin    string    `json:"admin,omitempty"` // socket of /metrics, /readyz, …
	// Ready and Reason are not in the file: Inspect asks each daemon.
	Ready  bool   `json:"ready"`
	Reason string `json:"reason,omitempty"`
}

// ReadStatus reads the status of the deployment in a Run folder; ErrDown when there is none or its supervisor is dead.
func ReadStatus(run string) (*Status, error) {
	s, err := LastStatus(run)
	if err == nil && !locked(paths{run: run}.lock()) {
		err = ErrDown
	}
	if errors.Is(err, ErrDown) {
		return nil, fmt.Errorf("%w in %s: start one with `hearth up`, or name another with --run", ErrDown, run)
	}
	return s, err
}

// LastStatus is ReadStatus for a deployment whose supervisor may have died: what it last wrote.
func LastStatus(run string) (*Status, error) {
	path := paths{run: run}.status()
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrDown
	}
	if err != nil {
		return nil, fmt.Errorf("read status: %w", err)
	}
	s := &Status{}
	if err := json.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("read status %s: %w", path, err)
	}
	return s, nil
}

// Inspect is ReadStatus, with what each daemon says of its readiness.
func Inspect(ctx context.Context, run string) (*Status, error) {
	s, err := ReadStatus(run)
	if err != nil {
		return nil, err
	}
	var all sync.WaitGroup
	for i := range s.Daemons {
		d := &s.Daemons[i]
		all.Go(func() {
			attempt, done := context.WithTimeout(ctx, probeTime)
			defer done()
			err := s.probe(d)(attempt)
			d.Ready = err == nil && d.PID > 0
			if err != nil {
				d.Reason = err.Error()
			}
		})
	}
	all.Wait()
	return s, nil
}

func (s *Status) probe(d *Daemon) probe {
	switch {
	case d.Admin != "":
		return probeReadyz(d.Admin)
	case d.Name == nameRegistry:
		return probeDial("tcp", s.Registry)
	default:
		return probeDial("unix", paths{run: s.Run}.containerdSocket())
	}
}

// board keeps the Status and writes it down whenever it changes.
type board struct {
	path  string
	dirty chan struct{} // holds one: something changed since the last write

	mu     sync.Mutex // guards status
	status Status
}

func newBoard(path string, status Status) *board {
	return &board{path: path, status: status, dirty: make(chan struct{}, 1)}
}

func (b *board) change(f func(*Status)) {
	b.mu.Lock()
	f(&b.status)
	b.mu.Unlock()
	select {
	case b.dirty <- struct{}{}:
	default:
	}
}

// add puts a child on the board before it is started.
func (b *board) add(d Daemon) { b.change(func(s *Status) { s.Daemons = append(s.Daemons, d) }) }

// report is a keeper's.
func (b *board) report(name string, pid int, ended error) {
	b.change(func(s *Status) {
		i := slices.IndexFunc(s.Daemons, func(d Daemon) bool { return d.Name == name })
		if i < 0 {
			return
		}
		d := &s.Daemons[i]
		d.PID = pid
		if pid > 0 {
			d.Started = time.Now()
			return
		}
		d.Restarts++
		if ended != nil {
			d.Error = ended.Error()
		}
	})
}

func (b *board) snapshot() Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.status
	s.Daemons = slices.Clone(s.Daemons)
	return s
}

func (b *board) restarts(name string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.status.Daemons {
		if d.Name == name {
			return d.Restarts
		}
	}
	return 0
}

// run writes the status until ctx is done. That it cannot be written stops nothing.
func (b *board) run(ctx context.Context, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.dirty:
			if err := b.write(); err != nil {
				log.Error("status cannot be written", "file", b.path, "err", err)
			}
		}
	}
}

func (b *board) write() error {
	data, err := json.MarshalIndent(b.snapshot(), "", "  ")
	if err != nil {
		return err
	}
	next := b.path + ".next"
	if err := os.WriteFile(next, append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(next, b.path)
}
