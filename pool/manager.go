package pool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-serverless/hearth/pool/store"
)

// ErrStale is what Run ends with when a node has seen a later term than ours: another poolmanager has taken over, or the store was
// lost. The next term that is begun on this store is later than that one.
var ErrStale = errors.New("a later term has begun")

// DefaultPoolSize is how many warm Instances a node keeps.
const DefaultPoolSize = 3

// DefaultClaimsPerNode is how many claims may be under way on a node at once: a burst of starts from a pool should not queue here.
const DefaultClaimsPerNode = 100

// Store keeps what must survive: pool/store is one. It has more than four methods because Functions and Runtimes are one truth, in
// one file that one term writes. Safe for concurrent use.
type Store interface {
	// BeginTerm returns a number greater than all before and than after, and durable.
	BeginTerm(after int64) (int64, error)
	Records() ([]store.Record, error)
	// Put and Delete are durable when they return.
	Put(store.Record) error
	Delete(name string) error
	Runtimes() ([]store.Runtime, error)
	// PutRuntime is durable when it returns. A deleted Runtime is put without what was applied.
	PutRuntime(store.Runtime) error
}

// Config says what a Manager works with. Store must be set.
type Config struct {
	// Nodes that are there from the beginning; see AddNode.
	Nodes map[string]Node
	Store Store
	// PoolSize is how many sandboxes each node keeps, besides the booted Instances that Runtimes ask for; default DefaultPoolSize,
	// negative is none.
	PoolSize int
	// ClaimsPerNode may be under way at once, one Function's being at most three quarters of them; default DefaultClaimsPerNode.
	ClaimsPerNode int
	// PodWorkers and PodMemoryBytes bound a pod that Functions of a group share: Instances, and the sum of their memory limits, a
	// Function that names none counting as 1 GiB; defaults DefaultPodWorkers and DefaultPodMemoryBytes.
	PodWorkers     int
	PodMemoryBytes int64
	// FrozenTTL is how long an Instance stays frozen that nobody asks for; default 1 h, negative freezes none.
	FrozenTTL time.Duration
	// Snapshots of a Revision that a node keeps prepared; default 2, negative is none.
	Snapshots int
	// PrepareNodes is on how many nodes a Function's Revision is prepared ahead of use; 0 is all of them.
	PrepareNodes int
	// Changed is told the id of each Instance whose state or claim changed, or that is gone. It must not block. May be nil.
	Changed func(instance string)
	// NodeTimeout is how long the endpoints of a node that cannot be reached stay; default 30 s.
	NodeTimeout time.Duration
	// DrainTimeout bounds a drain, on top of the Function's own timeout; default 30 s.
	DrainTimeout time.Duration
	// Ready is told, when that changes, why no allocation can succeed, or nil. It must not block. May be nil.
	Ready      func(error)
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

func (c Config) withDefaults() (Config, error) {
	if c.Store == nil {
		return c, errors.New("pool: Config.Store is not set")
	}
	if c.PoolSize == 0 {
		c.PoolSize = DefaultPoolSize
	}
	if c.Snapshots == 0 {
		c.Snapshots = 2
	}
	c.PoolSize, c.Snapshots = max(0, c.PoolSize), max(0, c.Snapshots)
	if c.ClaimsPerNode <= 0 {
		c.ClaimsPerNode = DefaultClaimsPerNode
	}
	if c.PodWorkers <= 0 {
		c.PodWorkers = DefaultPodWorkers
	}
	if c.PodMemoryBytes <= 0 {
		c.PodMemoryBytes = DefaultPodMemoryBytes
	}
	if c.FrozenTTL == 0 {
		c.FrozenTTL = time.Hour
	}
	if c.NodeTimeout <= 0 {
		c.NodeTimeout = 30 * time.Second
	}
	if c.DrainTimeout <= 0 {
		c.DrainTimeout = 30 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Manager holds one term. Use New; it works while Run does. Safe for concurrent use.
type Manager struct {
	config  Config
	log     *slog.Logger
	metrics *metrics
	epoch   int64
	wake    chan struct{} // of capacity one: there are actions, or an earlier alarm
	open    chan struct{} // closed when this term knows what there is: see gather
	applies sync.Mutex    // held over the store's writes, so that they have one order; taken before mu

	mu           sync.Mutex // guards what follows and all that it leads to; never held over I/O
	running      bool
	closed       bool
	fatal        error
	actions      []func(context.Context)
	alarm        time.Time // when to step again; zero is never
	version      int64     // of the last Endpoints event
	nodes        map[string]*node
	warmSets     []WarmSet
	gathered     bool
	gatherEnd    time.Time
	up           int       // nodes that are synced
	listen       bool      // whether a node is silent may have changed: see hush
	waited       bool      // allocations waited when stocks were looked at last
	settleAt     time.Time // when Functions are prepared anew; zero is never
	functions    map[string]*function
	changed      map[*function]struct{}        // that gateways have to hear of
	attended     map[*function]struct{}        // see attend
	lacking      map[*function]struct{}        // that may have fewer than their minimum
	holders      map[string]map[*node]struct{} // nodes that have a Revision, by its name
	serials      map[string]int64
	tombstones   map[string]int64 // versions of the events that deleted Functions
	runtimes     map[string]*runtime
	instances    map[string]*instance
	index        index
	frozenEnd    time.Time     // when the first frozen Instance has been kept long enough; zero is never
	queue        []*allocation // that have no Instance, in the order in which they came
	allocations  map[string]*allocation
	unfinished   map[string]map[*allocation]struct{} // by Function
	succeeded    []*allocation                       // that are remembered, in the order in which they ended
	subscribers  map[string]*subscriber
	acknowledged chan struct{} // closed, and another made, whenever one has acknowledged
	news         chan struct{} // and this one whenever an Instance has become warm, or could not be made
}

// New begins a term and reads the store. The Manager does nothing before Run.
func New(c Config) (*Manager, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	epoch, err := c.Store.BeginTerm(0)
	if err != nil {
		return nil, fmt.Errorf("begin a term: %w", err)
	}
	records, err := c.Store.Records()
	if err != nil {
		return nil, fmt.Errorf("read functions: %w", err)
	}
	runtimes, err := c.Store.Runtimes()
	if err != nil {
		return nil, fmt.Errorf("read runtimes: %w", err)
	}
	m := &Manager{
		config: c, log: c.Logger.With("epoch", epoch), epoch: epoch, wake: make(chan struct{}, 1), open: make(chan struct{}),
		// So that versions grow over restarts too.
		version: epoch << 32,
		nodes:   map[string]*node{}, functions: map[string]*function{}, changed: map[*function]struct{}{}, attended: map[*function]struct{}{}, lacking: map[*function]struct{}{},
		holders: map[string]map[*node]struct{}{}, serials: map[string]int64{},
		tombstones: map[string]int64{}, runtimes: map[string]*runtime{}, instances: map[string]*instance{}, index: newIndex(),
		allocations: map[string]*allocation{}, unfinished: map[string]map[*allocation]struct{}{},
		subscribers: map[string]*subscriber{}, acknowledged: make(chan struct{}), news: make(chan struct{}),
	}
	m.metrics = newMetrics(c.Registerer, m)
	now := time.Now()
	for name, client := range c.Nodes {
		m.newNode(now, name, client, NodeInfo{})
	}
	for _, r := range records {
		m.load(r)
	}
	for _, r := range runtimes {
		m.runtimes[r.Name] = newRuntime(r)
	}
	return m, nil
}

func (m *Manager) load(r store.Record) {
	m.serials[r.Name] = r.Serial
	m.version++
	if r.Function == nil {
		m.tombstones[r.Name] = m.version
		return
	}
	f := newFunction(r)
	f.version = m.version
	m.functions[r.Name] = f
	m.attend(f)
}

// Epoch is the number of this Manager's term.
func (m *Manager) Epoch() int64 { return m.epoch }

// tellReady says whether at least one node has told of all its Instances. Guarded by mu.
func (m *Manager) tellReady() {
	switch {
	case m.config.Ready == nil:
	case m.up == 0:
		m.config.Ready(errNoNode)
	default:
		m.config.Ready(nil)
	}
}

// Run watches the nodes and acts until ctx is done, and waits for everything that it began. It ends with ErrStale when this term
// is over. It may be called once.
func (m *Manager) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	m.mu.Lock()
	now := time.Now()
	m.running, m.gatherEnd = true, now.Add(gatherTime)
	m.tellReady()
	m.step(now)
	m.mu.Unlock()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		actions, alarm, fatal := m.take()
		for _, act := range actions {
			work.Go(func() { act(ctx) })
		}
		if fatal != nil {
			m.close(fatal)
			return fatal
		}
		timer.Reset(alarm)
		select {
		case <-ctx.Done():
			m.close(errShutdown)
			return nil
		case <-m.wake:
		case now := <-timer.C:
			m.mu.Lock()
			m.step(now)
			m.mu.Unlock()
		}
	}
}

func (m *Manager) take() (actions []func(context.Context), alarm time.Duration, fatal error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	actions, m.actions = m.actions, nil
	alarm = time.Hour
	if !m.alarm.IsZero() {
		alarm = max(0, time.Until(m.alarm))
	}
	return actions, alarm, m.fatal
}

// close lets everybody go who waits.
func (m *Manager) close(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed, m.running = true, false
	now := time.Now()
	for _, a := range m.allocations {
		if !a.finished() {
			m.finish(now, a, nil, unavailable(err))
		}
	}
	m.queue = nil
	m.tellStocked()
	for _, s := range m.subscribers {
		for stream := range s.streams {
			stream.end(unavailable(err))
		}
	}
}

// do has act called outside of the mutex, in a goroutine that Run waits for. Guarded by mu.
func (m *Manager) do(act func(context.Context)) {
	if m.closed {
		return
	}
	m.actions = append(m.actions, act)
	m.kick()
}

func (m *Manager) kick() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// at has step called at t, if not before. Guarded by mu.
func (m *Manager) at(t time.Time) {
	if m.alarm.IsZero() || t.Before(m.alarm) {
		m.alarm = t
	}
}

// step takes every decision anew. It is called after every fact that changed. Guarded by mu.
func (m *Manager) step(now time.Time) {
	if !m.running {
		return
	}
	m.alarm = time.Time{}
	m.gather(now)
	m.hush()
	m.expireNodes(now)
	m.expireInstances(now)
	m.expireFrozen(now)
	m.expireAllocations(now)
	m.expireSubscribers(now)
	if m.gathered {
		m.reserve(now)
		m.rollOut(now)
	}
	m.publish()
	m.endDrains(now)
	if m.gathered {
		m.dispatch(now)
	}
	m.refillNodes(now)
	m.prepareAll(now)
	m.discardNext(now)
	m.forgetOld()
	m.finishDeletions()
	m.publish()
	m.kick()
}

// fact runs change and then step, under the mutex.
func (m *Manager) fact(change func(now time.Time)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	change(now)
	m.step(now)
}

// setSynced notes whether a node's stream has told everything, and so how many are there.
func (m *Manager) setSynced(n *node, synced bool) {
	switch {
	case synced && !n.synced:
		m.up++
	case !synced && n.synced:
		m.up--
	}
	n.synced, m.listen = synced, true
}

// stale ends this term.
func (m *Manager) stale(ctx context.Context, node string, epoch int64) {
	m.log.Error("a node has seen a later term; this poolmanager stops", "node", node, "seen", epoch)
	err := fmt.Errorf("%w: node %s has seen term %d and this is term %d", ErrStale, node, epoch, m.epoch)
	if ctx.Err() == nil {
		if _, raised := m.config.Store.BeginTerm(epoch); raised != nil {
			err = errors.Join(err, raised)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fatal = err
	m.kick()
}
