package scale_test

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
)

// What a node takes for something: a Runtime's boot after its sandbox is there, code's load in it, a thaw, a pull of what is small.
const (
	bootTime    = 300 * time.Millisecond
	loadTime    = 10 * time.Millisecond
	thawTime    = time.Millisecond
	prepareTime = 20 * time.Millisecond
)

// claimed is a claim that a node carried out, or refused because it had seen a later term.
type claimed struct {
	function, instance, claim string
	epoch                     int64
	at                        time.Time
	stale                     bool
}

// ledger has every claim on every node, in the order in which they were decided.
type ledger struct {
	mu  sync.Mutex // guards all
	all []claimed
}

func (l *ledger) add(c claimed) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, c)
}

// since are the claims from the n-th on.
func (l *ledger) since(n int) []claimed {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all[n:])
}

func (l *ledger) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.all)
}

// agent is the nodeagent of a node that is not there. It keeps NodeService's contract: one claim to an Instance, by compare-and-swap, and
// none of a term that is over.
type agent struct {
	hearthv1connect.UnimplementedNodeServiceHandler
	name    string
	address string // of all its Instances
	ledger  *ledger
	// sandbox waits until the kubelet runs a pod.
	sandbox func(ctx context.Context, pod string) error

	mu        sync.Mutex // guards what follows
	epoch     int64
	version   int64
	instances map[string]*hearthv1.Instance
	starts    map[string]*start // of each Instance, the last
	watchers  map[chan *hearthv1.WatchInstancesResponse]struct{}
}

// start is a claim that is carried out.
type start struct {
	claim string
	done  chan struct{}
	said  *hearthv1.Instance
}

func newAgent(name, address string, l *ledger, sandbox func(context.Context, string) error) *agent {
	return &agent{name: name, address: address, ledger: l, sandbox: sandbox, instances: map[string]*hearthv1.Instance{}, starts: map[string]*start{},
		watchers: map[chan *hearthv1.WatchInstancesResponse]struct{}{}}
}

// watched is how many changes a watcher may be behind.
const watched = 4096

func refuse(c connect.Code, format string, args ...any) error {
	return connect.NewError(c, fmt.Errorf(format, args...))
}

// admit takes in a term, and says whether it is over. Guarded by mu.
func (a *agent) admit(epoch int64) error {
	if epoch < a.epoch && epoch != 0 {
		return refuse(connect.CodeFailedPrecondition, "epoch %d is over: this node has seen %d", epoch, a.epoch)
	}
	a.epoch = max(a.epoch, epoch)
	return nil
}

// set changes an Instance and tells all watchers. Guarded by mu.
func (a *agent) set(i *hearthv1.Instance, s hearthv1.State) *hearthv1.Instance {
	a.version++
	i.State, i.Version = s, a.version
	if s == hearthv1.State_STATE_GONE {
		delete(a.instances, i.Id)
		delete(a.starts, i.Id)
	}
	said := proto.CloneOf(i)
	for w := range a.watchers {
		select {
		case w <- &hearthv1.WatchInstancesResponse{Event: &hearthv1.WatchInstancesResponse_Instance{Instance: said}, Node: a.name, Epoch: a.epoch}:
		default: // it begins anew
			delete(a.watchers, w)
			close(w)
		}
	}
	return said
}

// CreateInstance waits for the pod's sandbox, as nodeagent does.
func (a *agent) CreateInstance(ctx context.Context, r *connect.Request[hearthv1.CreateInstanceRequest]) (*connect.Response[hearthv1.CreateInstanceResponse], error) {
	id := r.Msg.GetId()
	if err := a.sandbox(ctx, cmp.Or(r.Msg.GetPod(), id)); err != nil {
		return nil, refuse(connect.CodeUnavailable, "wait for the sandbox of %s: %w", id, err)
	}
	if r.Msg.GetRuntime() != nil {
		time.Sleep(bootTime)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	i := a.instances[id]
	if i == nil {
		i = &hearthv1.Instance{Id: id, Pod: cmp.Or(r.Msg.GetPod(), id), Node: a.name, Degree: r.Msg.GetDegree(), CreatedAt: timestamppb.Now(),
			Runtime: r.Msg.GetRuntime().GetName(), RuntimeGeneration: r.Msg.GetRuntime().GetGeneration()}
		a.instances[id] = i
		a.set(i, hearthv1.State_STATE_WARM)
	}
	return connect.NewResponse(&hearthv1.CreateInstanceResponse{Instance: proto.CloneOf(i)}), nil
}

// Activate is the compare-and-swap.
func (a *agent) Activate(_ context.Context, r *connect.Request[hearthv1.ActivateRequest]) (*connect.Response[hearthv1.ActivateResponse], error) {
	s, err := a.claim(r.Msg)
	if err != nil {
		return nil, err
	}
	<-s.done
	if s.said == nil {
		return nil, refuse(connect.CodeInternal, "instance %s was discarded while it started", r.Msg.GetInstanceId())
	}
	return connect.NewResponse(&hearthv1.ActivateResponse{Instance: s.said, Phases: []*hearthv1.Phase{{Name: "load"}}}), nil
}

func (a *agent) claim(r *hearthv1.ActivateRequest) (*start, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := claimed{r.GetRevision().GetFunction(), r.GetInstanceId(), r.GetClaim().GetId(), r.GetClaim().GetEpoch(), time.Now(), false}
	if err := a.admit(c.epoch); err != nil {
		c.stale = true
		a.ledger.add(c)
		return nil, err
	}
	i := a.instances[c.instance]
	if i == nil {
		return nil, refuse(connect.CodeNotFound, "there is no instance %s", c.instance)
	}
	if s := a.starts[i.Id]; s != nil && s.claim == c.claim {
		return s, nil
	}
	takes := loadTime
	switch rt := r.GetRevision().GetRuntime(); {
	case i.State == hearthv1.State_STATE_FROZEN && i.Revision == r.GetRevision().GetName():
		takes = thawTime
	case i.State != hearthv1.State_STATE_WARM || i.Runtime != "" && (i.Runtime != rt.GetName() || i.RuntimeGeneration != rt.GetGeneration()):
		return nil, refuse(connect.CodeFailedPrecondition, "instance %s is %v with revision %q and runtime %q", i.Id, i.State, i.Revision, i.Runtime)
	}
	a.ledger.add(c)
	s := &start{claim: c.claim, done: make(chan struct{})}
	i.Claim, i.Function, i.Revision, a.starts[i.Id] = r.GetClaim(), c.function, r.GetRevision().GetName(), s
	a.set(i, hearthv1.State_STATE_CLAIMED)
	go a.serve(i, s, takes) // it goes on, whoever waits
	return s, nil
}

func (a *agent) serve(i *hearthv1.Instance, s *start, takes time.Duration) {
	defer close(s.done)
	time.Sleep(takes)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.instances[i.Id] == i && a.starts[i.Id] == s {
		i.Address = a.address
		s.said = a.set(i, hearthv1.State_STATE_SERVING)
	}
}

// Freeze stops what serves.
func (a *agent) Freeze(_ context.Context, r *connect.Request[hearthv1.FreezeRequest]) (*connect.Response[hearthv1.FreezeResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.admit(r.Msg.GetEpoch()); err != nil {
		return nil, err
	}
	i := a.instances[r.Msg.GetInstanceId()]
	switch {
	case i == nil:
		return nil, refuse(connect.CodeNotFound, "there is no instance %s", r.Msg.GetInstanceId())
	case i.State == hearthv1.State_STATE_SERVING:
		a.set(i, hearthv1.State_STATE_FROZEN)
	case i.State != hearthv1.State_STATE_FROZEN:
		return nil, refuse(connect.CodeFailedPrecondition, "instance %s is %v", i.Id, i.State)
	}
	return connect.NewResponse(&hearthv1.FreezeResponse{Instance: proto.CloneOf(i)}), nil
}

// Discard ends an Instance.
func (a *agent) Discard(_ context.Context, r *connect.Request[hearthv1.DiscardRequest]) (*connect.Response[hearthv1.DiscardResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.admit(r.Msg.GetEpoch()); err != nil {
		return nil, err
	}
	if i := a.instances[r.Msg.GetInstanceId()]; i != nil {
		a.set(i, hearthv1.State_STATE_GONE)
	}
	return connect.NewResponse(&hearthv1.DiscardResponse{}), nil
}

// PrepareRevision has everything, in a moment.
func (a *agent) PrepareRevision(_ context.Context, r *connect.Request[hearthv1.PrepareRevisionRequest]) (*connect.Response[hearthv1.PrepareRevisionResponse], error) {
	time.Sleep(prepareTime)
	return connect.NewResponse(&hearthv1.PrepareRevisionResponse{Image: r.Msg.GetRevision().GetImage()}), nil
}

// ForgetRevision has nothing to forget.
func (a *agent) ForgetRevision(context.Context, *connect.Request[hearthv1.ForgetRevisionRequest]) (*connect.Response[hearthv1.ForgetRevisionResponse], error) {
	return connect.NewResponse(&hearthv1.ForgetRevisionResponse{}), nil
}

// WatchInstances sends all, the mark, and each change.
func (a *agent) WatchInstances(ctx context.Context, r *connect.Request[hearthv1.WatchInstancesRequest], out *connect.ServerStream[hearthv1.WatchInstancesResponse]) error {
	w := make(chan *hearthv1.WatchInstancesResponse, watched)
	a.mu.Lock()
	_ = a.admit(r.Msg.GetEpoch()) // who is too late is told so by what follows
	opening := make([]*hearthv1.WatchInstancesResponse, 0, len(a.instances)+1)
	for _, i := range a.instances {
		opening = append(opening, &hearthv1.WatchInstancesResponse{Event: &hearthv1.WatchInstancesResponse_Instance{Instance: proto.CloneOf(i)}, Node: a.name, Epoch: a.epoch})
	}
	opening = append(opening, &hearthv1.WatchInstancesResponse{Event: &hearthv1.WatchInstancesResponse_Synced{Synced: true}, Node: a.name, Epoch: a.epoch})
	a.watchers[w] = struct{}{}
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.watchers, w)
	}()
	for _, e := range opening {
		if err := out.Send(e); err != nil {
			return err
		}
	}
	for {
		select {
		case e, more := <-w:
			if !more {
				return refuse(connect.CodeResourceExhausted, "the watcher is too slow; watch again")
			}
			if err := out.Send(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// answers serves HTTP in the stead of all Instances of a node.
func answers(l net.Listener) *http.Server {
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })}
	go func() { _ = s.Serve(l) }()
	return s
}
