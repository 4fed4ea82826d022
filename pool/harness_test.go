package pool_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
	"github.com/hearth-serverless/hearth/pool/store"
)

// memory is a store that is as durable as the test.
type memory struct {
	mu       sync.Mutex
	epoch    int64
	records  map[string]store.Record
	runtimes map[string]store.Runtime
	fail     error
}

func (s *memory) BeginTerm(after int64) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epoch = max(s.epoch, after) + 1
	return s.epoch, s.fail
}

func (s *memory) Records() (all []store.Record, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.records {
		all = append(all, r)
	}
	return all, s.fail
}

func (s *memory) Put(r store.Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail == nil {
		s.records[r.Name] = r
	}
	return s.fail
}

func (s *memory) Delete(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail == nil {
		s.records[name] = store.Record{Name: name, Serial: s.records[name].Serial}
	}
	return s.fail
}

func (s *memory) Runtimes() (all []store.Runtime, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.runtimes {
		all = append(all, r)
	}
	return all, s.fail
}

func (s *memory) PutRuntime(r store.Runtime) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail == nil {
		s.runtimes[r.Name] = r
	}
	return s.fail
}

func newMemory() *memory {
	return &memory{records: map[string]store.Record{}, runtimes: map[string]store.Runtime{}}
}

// running is a Manager with its Run.
type running struct {
	*pool.Manager
	t      *testing.T
	cancel context.CancelFunc
	ended  chan error
}

func start(t *testing.T, c pool.Config) *running {
	t.Helper()
	c.Registerer = prometheus.NewRegistry()
	m, err := pool.New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{Manager: m, t: t, cancel: cancel, ended: make(chan error, 1)}
	go func() { r.ended <- m.Run(ctx) }()
	settle()
	return r
}

func (r *running) stop() {
	r.cancel()
	if err := <-r.ended; err != nil && !errors.Is(err, pool.ErrStale) {
		r.t.Errorf("Run: %v", err)
	}
}

func (r *running) apply(name string, change func(*hearthv1.FunctionSpec)) *hearthv1.Function {
	r.t.Helper()
	spec := &hearthv1.FunctionSpec{Image: "registry.example/" + name + ":1", Scaling: &hearthv1.Scaling{Max: 100}}
	if change != nil {
		change(spec)
	}
	res, err := r.Apply(r.t.Context(), connect.NewRequest(&hearthv1.ApplyRequest{Function: &hearthv1.Function{Name: name, Spec: spec}}))
	if err != nil {
		r.t.Fatalf("apply %s: %v", name, err)
	}
	return res.Msg.GetFunction()
}

// runIn makes a spec one of code in a Runtime.
func runIn(s *hearthv1.FunctionSpec, runtime string) {
	s.Image, s.Runtime = "", runtime
	s.Code = &hearthv1.Code{Package: "registry.example/code@sha256:" + strings.Repeat("a", 64), Handler: "main.hello"}
}

func (r *running) applyRuntime(name string, warm int32, preload ...string) *hearthv1.Runtime {
	r.t.Helper()
	spec := &hearthv1.Runtime{Name: name, Image: "registry.example/runtime/" + name + ":1", Preload: preload, Warm: warm}
	res, err := r.ApplyRuntime(r.t.Context(), connect.NewRequest(&hearthv1.ApplyRuntimeRequest{Runtime: spec}))
	if err != nil {
		r.t.Fatalf("apply runtime %s: %v", name, err)
	}
	return res.Msg.GetRuntime()
}

func (r *running) runtimeStatus(name string) *hearthv1.Runtime {
	r.t.Helper()
	res, err := r.ListRuntimes(r.t.Context(), connect.NewRequest(&hearthv1.ListRuntimesRequest{}))
	if err != nil {
		r.t.Fatalf("list runtimes: %v", err)
	}
	for _, one := range res.Msg.GetRuntimes() {
		if one.GetName() == name {
			return one
		}
	}
	return nil
}

// checkIndex fails the test if the index says anything else than the Instances.
func (r *running) checkIndex() {
	r.t.Helper()
	if err := pool.CheckIndex(r.Manager); err != nil {
		r.t.Error(err)
	}
}

func (r *running) allocate(name, id string, within time.Duration) (*hearthv1.AllocateResponse, error) {
	res, err := r.Allocate(r.t.Context(), connect.NewRequest(&hearthv1.AllocateRequest{Function: name, Id: id, Deadline: timestamppb.New(time.Now().Add(within))}))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (r *running) must(name string) *hearthv1.AllocateResponse {
	r.t.Helper()
	res, err := r.allocate(name, "", 30*time.Second)
	if err != nil {
		r.t.Fatalf("allocate %s: %v", name, err)
	}
	return res
}

func (r *running) status(name string) *hearthv1.FunctionStatus {
	r.t.Helper()
	res, err := r.Get(r.t.Context(), connect.NewRequest(&hearthv1.GetRequest{Name: name}))
	if err != nil {
		r.t.Fatalf("get %s: %v", name, err)
	}
	return res.Msg.GetFunction().GetStatus()
}

func (r *running) release(req *hearthv1.ReleaseRequest) int {
	r.t.Helper()
	res, err := r.Release(r.t.Context(), connect.NewRequest(req))
	if err != nil {
		r.t.Fatalf("release: %v", err)
	}
	return int(res.Msg.GetReleased())
}

func wantCode(t testing.TB, err error, want connect.Code) {
	t.Helper()
	if connect.CodeOf(err) != want || err == nil {
		t.Errorf("error is %v, want code %s", err, want)
	}
}

func seconds(n int) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Second) }

// gateway is a subscriber that keeps what it is told.
type gateway struct {
	mu      sync.Mutex
	t       *testing.T
	latest  map[string]*hearthv1.Endpoints
	version int64
	synced  bool
	gone    map[string]bool
	// mayReturn allows an Instance to be back after it was gone, as it is when its node is.
	mayReturn bool
	err       error
	cancel    context.CancelFunc
	finished  chan struct{}
}

func (r *running) gateway(name string) *gateway {
	ctx, cancel := context.WithCancel(r.t.Context())
	g := &gateway{t: r.t, latest: map[string]*hearthv1.Endpoints{}, gone: map[string]bool{}, cancel: cancel, finished: make(chan struct{})}
	go func() {
		defer close(g.finished)
		err := r.Subscribe(ctx, name, g.take)
		g.mu.Lock()
		g.err = err
		g.mu.Unlock()
	}()
	settle()
	return g
}

func (g *gateway) take(m *hearthv1.WatchResponse) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if m.GetSynced() {
		g.synced = true
		return nil
	}
	e := m.GetEndpoints()
	if e.GetVersion() <= g.version {
		g.t.Errorf("version %d of %s came after %d", e.GetVersion(), e.GetFunction(), g.version)
	}
	g.version = e.GetVersion()
	now := map[string]bool{}
	for _, i := range e.GetInstances() {
		now[tenure(i)] = true
		if g.gone[tenure(i)] && !g.mayReturn {
			g.t.Errorf("instance %s is back", i.GetId())
		}
	}
	for _, i := range g.latest[e.GetFunction()].GetInstances() {
		if !now[tenure(i)] {
			g.gone[tenure(i)] = true
		}
	}
	g.latest[e.GetFunction()] = e
	return nil
}

// tenure is an Instance under one claim: after a thaw it has another.
func tenure(i *hearthv1.Instance) string { return i.GetId() + " " + i.GetClaim().GetId() }

// serving lists the Instances of a Function that may get requests.
func (g *gateway) serving(function string) (ids []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, i := range g.latest[function].GetInstances() {
		if i.GetState() == hearthv1.State_STATE_SERVING {
			ids = append(ids, i.GetId())
		}
	}
	return ids
}

func (g *gateway) at() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.version
}

func (g *gateway) leave() {
	g.cancel()
	<-g.finished
}

// settle waits until nothing happens any more, and gateways know of what did.
func settle() {
	synctest.Wait()
	time.Sleep(pool.NewsDelay)
	synctest.Wait()
}
