package instance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/prefetch"
)

// reconcileInterval is how often containerd is compared with what the engine believes, besides after every reconnect.
const reconcileInterval = 15 * time.Second

// scratchDir is an empty directory below the root, for mounts that are made in a namespace of their own.
const scratchDir = "scratch"

// Engine is the engine of one node. All its methods are safe for concurrent use. Run has to be running; until it has read
// containerd's state all calls fail with Unavailable.
type Engine struct {
	cfg     Config
	log     *slog.Logger
	backend backend
	metrics *metrics
	hub     *hub
	library *library
	ahead   *ahead
	shelf   *shelf
	codes   *codeStore
	logs    *logStore
	strays  *strays // reconcileLoop's
	cgroups cgroups
	proc    string // where the kernel tells of memory and processes: /proc

	launcherRoot string // root file system that launchers run in

	jobs    chan func(context.Context) // Run's loop starts each in a goroutine that Run waits for
	stopped chan struct{}              // closed when Run takes no more jobs
	opened  chan struct{}              // closed when the state has been rebuilt
	check   chan struct{}              // asks for a comparison with containerd now

	versions versions
	starts   *starts
	imports  importBook

	mu        sync.Mutex // guards what follows; taken before an instance's mu, never after it
	instances map[string]*instance
	pods      map[string]*pod
	epoch     int64 // highest seen
}

var _ hearthv1connect.NodeServiceHandler = (*Engine)(nil)

// New makes an Engine. It connects to containerd only when Run is called, and containerd need not be there before then.
func New(cfg Config) (*Engine, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("instance engine: %w", err)
	}
	for _, dir := range []string{cfg.Root, filepath.Join(cfg.Root, scratchDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("instance engine: %w", err)
		}
	}
	root, err := writeLauncherRoot(cfg.Root, map[string]string{
		launcherProgram: cfg.Launcher, logWriterProgram: cfg.LogWriter, sidecarProgram: cfg.Sidecar,
	})
	if err != nil {
		return nil, fmt.Errorf("instance engine: %w", err)
	}
	n, err := connectNode(cfg)
	if err != nil {
		return nil, fmt.Errorf("instance engine: %w", err)
	}
	var b backend = n
	if cfg.Kubelet != "" {
		b = &kubeletNode{n, cfg.Kubelet}
	}
	e, err := newEngine(cfg, b, n.cgroups, "/proc")
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	e.launcherRoot = root
	return e, nil
}

func newEngine(cfg Config, b backend, c cgroups, proc string) (*Engine, error) {
	e := &Engine{
		cfg: cfg, log: cfg.Logger, backend: b, cgroups: c, proc: proc,
		jobs: make(chan func(context.Context)), stopped: make(chan struct{}), opened: make(chan struct{}),
		check:  make(chan struct{}, 1),
		starts: newStarts(), instances: map[string]*instance{}, pods: map[string]*pod{},
	}
	var err error
	if e.metrics, err = newMetrics(cfg.Registerer); err == nil {
		err = cfg.Registerer.Register(newUsage(e))
	}
	if err != nil {
		return nil, fmt.Errorf("instance engine: %w", err)
	}
	e.hub = newHub()
	e.library = newLibrary(b, cfg.Phases, e.spawn)
	e.ahead = &ahead{prefetch: cfg.Prefetch, spawn: e.spawn, known: map[string][]prefetch.Layer{}}
	e.shelf = newShelf(b, e.library, e.ahead, cfg.Logger, e.spawn, e.starts.lull)
	e.codes = newCodeStore(b, e.library, cfg.Logger, e.spawn)
	e.strays = &strays{dir: cfg.NetworkDir, proc: proc, age: cfg.NetworkAge}
	e.logs = &logStore{root: cfg.Root, kept: cfg.KeptLogs}
	return e, nil
}

// Ready is nil when the engine has rebuilt its state and containerd answers and has a network; otherwise it says what is missing.
func (e *Engine) Ready(ctx context.Context) error {
	if err := e.open(); err != nil {
		return err
	}
	return e.backend.Ready(ctx)
}

var (
	errStarting = fmt.Errorf("the node is starting: it waits for containerd: %w", errdefs.ErrUnavailable)
	errStopping = fmt.Errorf("the node is stopping: %w", errdefs.ErrUnavailable)
)

// open is an error until the state has been rebuilt.
func (e *Engine) open() error {
	select {
	case <-e.opened:
		return nil
	default:
		return errStarting
	}
}

// spawn has f run in the engine's own time, not the caller's: Run waits for it, and its context ends with Run's.
// It returns false when the engine stops and f will not run.
func (e *Engine) spawn(f func(context.Context)) bool {
	select {
	case e.jobs <- f:
		return true
	case <-e.stopped:
		return false
	}
}

// Run waits for containerd, rebuilds the state from it, serves, and compares with it now and then, until ctx is done. It leaves
// all Instances as they are: they serve on, and the next engine adopts them. Run may be called once.
func (e *Engine) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return e.runJobs(ctx) })
	group.Go(func() error { return e.followExits(ctx) })
	group.Go(func() error { return e.reconcileLoop(ctx) })
	group.Go(func() error { return e.watchFrozen(ctx) })
	err := group.Wait()
	e.hub.close()
	for _, i := range e.all() {
		i.letGo() // for the next engine
	}
	if closer, ok := e.backend.(interface{ Close() error }); ok {
		err = errors.Join(err, closer.Close())
	}
	return err
}

// runJobs starts what spawn is given, and returns when all of it has ended.
func (e *Engine) runJobs(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	defer close(e.stopped)
	for {
		select {
		case job := <-e.jobs:
			running.Go(func() { job(ctx) })
		case <-ctx.Done():
			return nil
		}
	}
}

// followExits listens for the ends of processes and, whenever it begins to listen (again), asks for a comparison, because what
// ended in between was not told.
func (e *Engine) followExits(ctx context.Context) error {
	for {
		err := e.backend.Exits(ctx, e.recheck, e.onExit)
		if ctx.Err() != nil {
			return nil
		}
		e.log.Warn("containerd's events ended", "error", err) // also when containerd is restarted
		if !sleep(ctx, time.Second) {
			return nil
		}
	}
}

// recheck asks for a comparison with containerd without waiting for it.
func (e *Engine) recheck() {
	select {
	case e.check <- struct{}{}:
	default:
	}
}

// reconcileLoop compares with containerd: first to rebuild, then to find what nobody told.
func (e *Engine) reconcileLoop(ctx context.Context) error {
	ticker := time.NewTicker(reconcileInterval)
	defer ticker.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-e.check:
		case <-retry.C:
		}
		err := e.reconcile(ctx)
		if err == nil {
			e.removeStrays(ctx)
		} else if ctx.Err() == nil {
			e.log.Debug("containerd does not answer", "error", err)
			retry.Reset(300 * time.Millisecond)
		}
	}
}

// lookup finds an Instance.
func (e *Engine) lookup(id string) (*instance, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	i, ok := e.instances[id]
	return i, ok
}

// all returns every Instance there is now.
func (e *Engine) all() []*instance {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Values(e.instances))
}

// admit refuses a caller of an older term and remembers a newer one. Zero is a human's, who is always admitted.
func (e *Engine) admit(epoch int64) error {
	if epoch == 0 {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if epoch < e.epoch {
		return fmt.Errorf("epoch %d is over: this node has seen %d: %w", epoch, e.epoch, errdefs.ErrFailedPrecondition)
	}
	e.epoch = epoch
	e.hub.setEpoch(epoch)
	return nil
}

// sleep waits, and is false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
