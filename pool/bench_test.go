package pool_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
	"github.com/hearth-serverless/hearth/pool/store"
)

// swift is a node with many frozen Instances that takes no time for anything.
type swift struct {
	mu     sync.Mutex
	all    map[string]*hearthv1.Instance
	events chan *hearthv1.WatchInstancesResponse
	// prepared gets a Revision's name for each that is.
	prepared chan string
}

func newSwift(functions, each int) *swift {
	n := &swift{all: map[string]*hearthv1.Instance{}, events: make(chan *hearthv1.WatchInstancesResponse, 1<<16),
		prepared: make(chan string, functions)}
	for f := range functions {
		for e := range each {
			id := fmt.Sprintf("i-%d-%d", f, e)
			n.all[id] = &hearthv1.Instance{Id: id, Node: "node", State: frozen, Version: 1, Function: fmt.Sprintf("f%d", f), Revision: fmt.Sprintf("f%d-00001", f),
				Degree: hearthv1.Degree_DEGREE_REVISION, Address: "10.0.0.1:8080", Claim: &hearthv1.Claim{Id: "before"}}
		}
	}
	return n
}

func (n *swift) tell(i *hearthv1.Instance) {
	n.events <- &hearthv1.WatchInstancesResponse{Node: "node", Event: &hearthv1.WatchInstancesResponse_Instance{Instance: i}}
}

func (n *swift) Watch(ctx context.Context, _ int64, event func(*hearthv1.WatchInstancesResponse) error) error {
	for _, i := range n.all {
		n.tell(i)
	}
	n.events <- &hearthv1.WatchInstancesResponse{Event: &hearthv1.WatchInstancesResponse_Synced{Synced: true}}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-n.events:
			if err := event(e); err != nil {
				return err
			}
		}
	}
}

func (n *swift) Activate(_ context.Context, r *hearthv1.ActivateRequest) (*hearthv1.ActivateResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := n.all[r.GetInstanceId()]
	next := func(s hearthv1.State) *hearthv1.Instance {
		i = &hearthv1.Instance{Id: i.Id, Node: i.Node, State: s, Version: i.Version + 1, Function: i.Function, Revision: i.Revision,
			Degree: i.Degree, Address: i.Address, Claim: r.GetClaim()}
		n.all[i.Id] = i
		n.tell(i)
		return i
	}
	next(claimed)
	return &hearthv1.ActivateResponse{Instance: next(serves), Phases: []*hearthv1.Phase{{Name: "thaw"}}}, nil
}

func (n *swift) CreateInstance(context.Context, *hearthv1.CreateInstanceRequest) (*hearthv1.Instance, error) {
	return nil, code(connect.CodeUnavailable, "none")
}

func (n *swift) Freeze(context.Context, *hearthv1.FreezeRequest) (*hearthv1.Instance, error) {
	return nil, code(connect.CodeUnavailable, "none")
}

func (n *swift) Discard(context.Context, *hearthv1.DiscardRequest) error { return nil }

func (n *swift) PrepareRevision(_ context.Context, r *hearthv1.PrepareRevisionRequest) (*hearthv1.PrepareRevisionResponse, error) {
	n.prepared <- r.GetRevision().GetName()
	return &hearthv1.PrepareRevisionResponse{Image: r.GetRevision().GetImage()}, nil
}

func (n *swift) ForgetRevision(context.Context, *hearthv1.ForgetRevisionRequest) error { return nil }

func (n *swift) ListImports(context.Context, *hearthv1.ListImportsRequest) (*hearthv1.ListImportsResponse, error) {
	return &hearthv1.ListImportsResponse{}, nil
}

// BenchmarkThaw is a claim of a frozen Instance among many, one after the other, with two gateways that watch:
//
//	go test ./pool -run '^$' -bench Thaw -benchtime 1000x
func BenchmarkThaw(b *testing.B) {
	for _, functions := range []int{10, 1000} {
		b.Run(fmt.Sprintf("functions=%d", functions), func(b *testing.B) { thaw(b, functions, max(1, 1000/functions)) })
	}
}

func thaw(b *testing.B, functions, each int) {
	var took []time.Duration
	for done := 0; done < b.N; {
		b.StopTimer()
		n := newSwift(functions, each)
		m, stop := stocked(b, n, functions, each)
		b.StartTimer()
		for at := 0; at < functions*each && done < b.N; at, done = at+1, done+1 {
			begun := time.Now()
			res, err := m.Allocate(b.Context(), connect.NewRequest(&hearthv1.AllocateRequest{Function: fmt.Sprintf("f%d", at%functions)}))
			if err != nil || res.Msg.GetInstance().GetClaim().GetId() == "before" {
				b.Fatal(res, err)
			}
			took = append(took, time.Since(begun))
		}
		b.StopTimer()
		stop()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2])/1e3, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100])/1e3, "p99-µs")
}

// stocked runs a manager that knows all that a node has, and waits until all is prepared there.
func stocked(b *testing.B, n *swift, functions, each int) (*pool.Manager, func()) {
	s := newMemory()
	for f := range functions {
		name := fmt.Sprintf("f%d", f)
		spec := &hearthv1.FunctionSpec{Image: "image", Scaling: &hearthv1.Scaling{Max: int32(each), Frozen: int32(each)}}
		s.records[name] = store.Record{Name: name, Serial: 1, Function: &hearthv1.Function{Name: name, Spec: spec, Status: &hearthv1.FunctionStatus{}},
			Revision: &hearthv1.Revision{Name: name + "-00001", Function: name, Image: "image"}}
	}
	m, err := pool.New(pool.Config{Nodes: map[string]pool.Node{"node": n}, Store: s, PoolSize: -1})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	var work sync.WaitGroup
	work.Go(func() {
		if err := m.Run(ctx); err != nil {
			b.Error(err)
		}
	})
	for range functions {
		<-n.prepared
	}
	for g := range 2 {
		synced := make(chan struct{})
		work.Go(func() {
			_ = m.Subscribe(ctx, fmt.Sprint("gateway", g), func(r *hearthv1.WatchResponse) error {
				if r.GetSynced() {
					close(synced)
				}
				return nil
			})
		})
		<-synced
	}
	return m, func() { cancel(); work.Wait() }
}
