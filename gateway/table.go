package gateway

import (
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/relay"
)

// maxTombstones bounds the memory of deleted Functions. They guard against events that arrive late, not against old ones.
const maxTombstones = 4096

// table is all that the gateway knows of Functions. Events carry versions: one that is not newer than what is known of its
// Function changes nothing, and a deletion is remembered, so that nothing old comes back to life.
type table struct {
	config  *Config
	log     *slog.Logger
	metrics *metrics
	wake    func(*function)
	hurry   func()
	tell    func()
	synced  chan struct{} // closed at the end of the first opening list

	mu         sync.RWMutex // guards everything below; taken before a function's
	functions  map[string]*function
	buried     []*function // deleted ones that still have requests in flight, which drains must hear of
	tombstones map[string]int64
	wants      map[string][]string  // hosts that each Function names, as far as it may
	hosts      map[string]*function // who gets them
	newest     int64                // highest version seen
	acked      int64                // highest version up to which all events have been acted upon
	opening    map[string]bool      // Functions named since the stream began; nil once it is in sync
	isSynced   bool                 // synced is closed
}

func newTable(c *Config, m *metrics, wake func(*function), hurry, tell func()) *table {
	return &table{
		config: c, log: c.Logger, metrics: m, wake: wake, hurry: hurry, tell: tell, synced: make(chan struct{}),
		functions: map[string]*function{}, tombstones: map[string]int64{},
		wants: map[string][]string{}, hosts: map[string]*function{},
	}
}

// find leads a route to its Function, and completes the route.
func (t *table) find(r route) (*function, route, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if f := t.hosts[r.host]; f != nil && !r.byHost {
		return f, route{host: r.host, name: f.name, byHost: true}, nil
	}
	if f := t.functions[r.name]; f != nil {
		return f, r, nil
	}
	if !t.isSynced {
		return nil, r, notLearned()
	}
	if r.name != "" {
		return nil, r, unknownFunction(r.name)
	}
	return nil, r, unknownFunction("host " + clipHost(r.host) + " or to this path")
}

func clipHost(host string) string { return host[:min(len(host), 253)] }

// ack is the version up to which this gateway has acted. Read it before the requests in flight: those then include every
// one that was admitted under older knowledge.
func (t *table) ack() int64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.acked
}

// all functions, with the buried ones last.
func (t *table) all() []*function {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buried = slices.DeleteFunc(t.buried, (*function).empty)
	return slices.AppendSeq(slices.Collect(maps.Values(t.functions)), slices.Values(t.buried))
}

// begin marks the start of a stream: its opening list is in no order of versions, so that nothing of it can be acknowledged
// before its end.
func (t *table) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.opening = map[string]bool{}
}

// event takes in one message of the stream.
func (t *table) event(m *hearthv1.WatchResponse, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case m.GetEndpoints() != nil:
		t.apply(m.GetEndpoints(), now)
	case m.GetSynced():
		t.sync(now)
	}
}

func (t *table) apply(e *hearthv1.Endpoints, now time.Time) {
	name := e.GetFunction()
	if !isLabel(name) {
		t.log.Warn("event for a function whose name is no dns label", "function", relay.Clip(name))
		return
	}
	if t.opening != nil {
		t.opening[name] = true
	}
	t.newest = max(t.newest, e.GetVersion())
	if t.opening == nil {
		defer func() { t.acked = t.newest; t.tell() }()
	}
	f := t.functions[name]
	switch {
	case e.GetDeleted() && f != nil && e.GetVersion() <= f.version:
	case e.GetDeleted():
		t.remove(name, e.GetVersion(), now)
	case f == nil && e.GetVersion() <= t.tombstones[name]:
	default:
		t.update(f, e, now)
	}
}

// update changes a Function, or makes it when f is nil.
func (t *table) update(f *function, e *hearthv1.Endpoints, now time.Time) {
	name := e.GetFunction()
	if f == nil {
		f = newFunction(name, t.config, t.metrics.function(name), t.wake, t.hurry, now)
		t.functions[name] = f
		delete(t.tombstones, name)
		t.log.Debug("function known", "function", name, "version", e.GetVersion())
	}
	if f.apply(e, now) {
		t.setHosts(name, e.GetSpec().GetHosts())
	}
}

// sync ends an opening list: what it did not name was deleted while nobody watched.
func (t *table) sync(now time.Time) {
	for name, f := range t.functions {
		if t.opening != nil && !t.opening[name] {
			t.remove(name, f.version, now)
		}
	}
	t.opening = nil
	t.acked = t.newest
	t.tell()
	if !t.isSynced {
		t.isSynced = true
		close(t.synced)
	}
	t.log.Info("in sync with poolmanager", "functions", len(t.functions), "version", t.newest)
}

func (t *table) remove(name string, version int64, now time.Time) {
	t.bound()
	t.tombstones[name] = max(version, t.tombstones[name])
	f := t.functions[name]
	if f == nil {
		return
	}
	delete(t.functions, name)
	t.setHosts(name, nil)
	f.bury(version, now)
	t.buried = append(t.buried, f)
	f.metrics.end()
	t.log.Debug("function deleted", "function", name, "version", version)
}

// bound makes room for a tombstone by dropping the oldest.
func (t *table) bound() {
	if len(t.tombstones) < maxTombstones {
		return
	}
	oldest := ""
	for name, version := range t.tombstones {
		if oldest == "" || version < t.tombstones[oldest] {
			oldest = name
		}
	}
	delete(t.tombstones, oldest)
}

// setHosts notes the hosts that a Function names. Of several that name the same one, the first by name gets it, so that all
// gateways agree.
func (t *table) setHosts(name string, hosts []string) {
	var wanted []string
	for _, h := range hosts {
		h = normalHost(h)
		if !mayHost(h, t.config.Domain) {
			t.log.Warn("host cannot be a function's", "function", name, "host", relay.Clip(h))
			continue
		}
		wanted = append(wanted, h)
	}
	if slices.Equal(wanted, t.wants[name]) {
		return
	}
	t.wants[name] = wanted
	if len(wanted) == 0 {
		delete(t.wants, name)
	}
	t.hosts = map[string]*function{}
	for _, name := range slices.Sorted(maps.Keys(t.wants)) {
		for _, h := range t.wants[name] {
			if other := t.hosts[h]; other != nil && other.name != name {
				t.log.Warn("host is named by two functions", "host", relay.Clip(h), "function", other.name, "ignored", name)
				continue
			}
			t.hosts[h] = t.functions[name]
		}
	}
}
