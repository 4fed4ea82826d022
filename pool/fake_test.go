package pool_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// fakeNode is a node in memory that keeps the contract of NodeService, and notes when somebody else does not. What it is made to
// do wrong is what networks and crashes do: lose answers, be slow, break streams, lose what was not Warm or Serving.
type fakeNode struct {
	t    testing.TB
	name string

	mu        sync.Mutex
	instances map[string]*hearthv1.Instance
	results   map[string]*hearthv1.ActivateResponse // by claim
	watchers  map[chan *hearthv1.WatchInstancesResponse]chan struct{}
	epoch     int64
	down      bool
	dead      bool                // no answer comes, of any kind
	wins      map[string][]string // claims that succeeded, by Instance
	created   int
	most      int // Instances that were neither serving nor going at once
	prepared  map[string]int
	images    map[string]bool // that were prepared
	forgotten map[string]bool // by Revision; the value is remove_image
	discards  []string
	concur    map[string]int // activations under way, by Function
	mostOf    map[string]int
	version   int64
	old       bool              // a node of before there were versions and Freeze
	owners    map[string]string // of pods
	imports   *hearthv1.ListImportsResponse
	freezes   int

	createTime, activateTime, prepareTime, freezeTime, watchTime time.Duration
	// hook may answer in the node's stead: before anything is done, or after (lost answers).
	before, after func(call, id string) error
	start         func(r *hearthv1.Revision) error
	// broken fails what has to do with a Runtime or an image.
	broken func(call string, r *hearthv1.Runtime, image string) error
}

func newFakeNode(t testing.TB, name string) *fakeNode {
	return &fakeNode{t: t, name: name, instances: map[string]*hearthv1.Instance{}, results: map[string]*hearthv1.ActivateResponse{},
		watchers: map[chan *hearthv1.WatchInstancesResponse]chan struct{}{}, wins: map[string][]string{}, prepared: map[string]int{}, images: map[string]bool{},
		forgotten: map[string]bool{}, owners: map[string]string{}, concur: map[string]int{}, mostOf: map[string]int{},
		createTime: 100 * time.Millisecond, activateTime: 50 * time.Millisecond, prepareTime: 10 * time.Millisecond, freezeTime: time.Millisecond}
}

func code(c connect.Code, format string, args ...any) error {
	return connect.NewError(c, fmt.Errorf(format, args...))
}

func (n *fakeNode) enter(ctx context.Context, call, id string) error {
	if err := ctx.Err(); err != nil {
		return code(connect.CodeCanceled, "%w", err)
	}
	if n.dead {
		n.mu.Unlock()
		<-ctx.Done()
		n.mu.Lock()
		return code(connect.CodeCanceled, "%w", ctx.Err())
	}
	if n.down {
		return code(connect.CodeUnavailable, "connection refused")
	}
	if n.before != nil {
		return n.before(call, id)
	}
	return nil
}

func (n *fakeNode) leave(call, id string) error {
	if n.after != nil {
		return n.after(call, id)
	}
	return nil
}

// emit tells every watcher how an Instance is now. Guarded by mu.
func (n *fakeNode) emit(i *hearthv1.Instance) {
	for w := range n.watchers {
		w <- &hearthv1.WatchInstancesResponse{Event: &hearthv1.WatchInstancesResponse_Instance{Instance: proto.CloneOf(i)}, Node: n.name, Epoch: n.epoch}
	}
}

func (n *fakeNode) set(i *hearthv1.Instance, s hearthv1.State) {
	if s < i.State && (i.State != hearthv1.State_STATE_FROZEN || s != hearthv1.State_STATE_CLAIMED) {
		n.t.Errorf("instance %s went back from %s to %s", i.Id, i.State, s)
	}
	i.State = s
	if !n.old {
		n.version++
		i.Version = n.version
	}
	if s == hearthv1.State_STATE_GONE {
		delete(n.instances, i.Id)
	}
	idle := 0
	for _, other := range n.instances {
		if other.State <= hearthv1.State_STATE_WARM {
			idle++
		}
	}
	n.most = max(n.most, idle)
	n.emit(i)
}

func (n *fakeNode) CreateInstance(ctx context.Context, r *hearthv1.CreateInstanceRequest) (*hearthv1.Instance, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.enter(ctx, "create", r.Id); err != nil {
		return nil, err
	}
	if n.instances[r.Id] == nil {
		if r.Pod != "" && (!n.holds(r.Pod) || n.own(r.Pod, r.Tenant+"/"+r.Group) != nil) {
			return nil, code(connect.CodeFailedPrecondition, "pod %s is not there for %s/%s", r.Pod, r.Tenant, r.Group)
		}
		i := &hearthv1.Instance{Id: r.Id, Pod: cmp.Or(r.Pod, r.Id), Tenant: r.Tenant, Group: r.Group, Node: n.name, State: hearthv1.State_STATE_CREATING, Degree: hearthv1.Degree_DEGREE_SANDBOX, CreatedAt: timestamppb.Now()}
		n.instances[r.Id] = i
		n.created++
		n.set(i, hearthv1.State_STATE_CREATING)
	}
	n.sleep(n.createTime)
	if n.broken != nil {
		if err := n.broken("create", r.Runtime, ""); err != nil {
			if i := n.instances[r.Id]; i != nil {
				n.set(i, hearthv1.State_STATE_GONE)
			}
			return nil, err
		}
	}
	i := n.instances[r.Id]
	if i == nil {
		return nil, code(connect.CodeUnavailable, "node restarted")
	}
	if i.State == hearthv1.State_STATE_CREATING {
		i.Degree, i.Runtime, i.RuntimeGeneration = r.Degree, r.Runtime.GetName(), r.Runtime.GetGeneration()
		if r.Runtime != nil {
			i.Language = r.Runtime.GetName() + " 3.11.2"
		}
		n.set(i, hearthv1.State_STATE_WARM)
	}
	return proto.CloneOf(i), n.leave("create", r.Id)
}

// holds tells whether somebody is in a pod.
func (n *fakeNode) holds(pod string) bool {
	for _, i := range n.instances {
		if i.Pod == pod && i.State >= hearthv1.State_STATE_WARM {
			return true
		}
	}
	return false
}

// own makes a pod somebody's, for ever.
func (n *fakeNode) own(pod, whose string) error {
	if is := n.owners[pod]; is != "" && is != whose {
		return code(connect.CodeFailedPrecondition, "pod %s is %s's, not %s's", pod, is, whose)
	}
	n.owners[pod] = whose
	return nil
}

// sleep without the mutex.
func (n *fakeNode) sleep(d time.Duration) {
	n.mu.Unlock()
	defer n.mu.Lock()
	time.Sleep(d)
}

func (n *fakeNode) Activate(ctx context.Context, r *hearthv1.ActivateRequest) (*hearthv1.ActivateResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.enter(ctx, "activate", r.InstanceId); err != nil {
		return nil, err
	}
	if res := n.results[r.Claim.Id]; res != nil {
		return res, nil
	}
	if r.Claim.Epoch < n.epoch {
		return nil, code(connect.CodeFailedPrecondition, "epoch %d is older than %d", r.Claim.Epoch, n.epoch)
	}
	n.epoch = r.Claim.Epoch
	i := n.instances[r.InstanceId]
	switch {
	case i == nil:
		return nil, code(connect.CodeNotFound, "no instance %s", r.InstanceId)
	case (r.Revision.Image == "") != (r.Revision.Code != nil) || (r.Revision.Code != nil) != (r.Revision.Runtime != nil):
		return nil, code(connect.CodeInvalidArgument, "an image, or a runtime with code: %v", r.Revision)
	case i.State == hearthv1.State_STATE_FROZEN && i.Revision == r.Revision.Name:
	case i.State != hearthv1.State_STATE_WARM:
		return nil, code(connect.CodeFailedPrecondition, "instance %s is %s with revision %s", i.Id, i.State, i.Revision)
	case i.Runtime != "" && (i.Runtime != r.Revision.Runtime.GetName() || i.RuntimeGeneration != r.Revision.Runtime.GetGeneration()):
		return nil, code(connect.CodeFailedPrecondition, "instance %s is of runtime %s %d", i.Id, i.Runtime, i.RuntimeGeneration)
	}
	whose := r.Revision.Tenant + "/" + r.Revision.Group
	if r.Revision.Group == "" {
		whose = i.Id
	}
	if err := n.own(i.Pod, whose); err != nil {
		return nil, err
	}
	if r.Revision.Group != "" {
		i.Tenant, i.Group = r.Revision.Tenant, r.Revision.Group
	}
	i.Claim, i.Function, i.Revision = r.Claim, r.Revision.Function, r.Revision.Name
	n.set(i, hearthv1.State_STATE_CLAIMED)
	n.concur[i.Function]++
	n.mostOf[i.Function] = max(n.mostOf[i.Function], n.concur[i.Function])
	n.sleep(n.activateTime)
	n.concur[i.Function]--
	if i = n.instances[r.InstanceId]; i == nil || i.State != hearthv1.State_STATE_CLAIMED {
		return nil, code(connect.CodeUnavailable, "node restarted")
	}
	if n.start != nil {
		if err := n.start(r.Revision); err != nil {
			n.set(i, hearthv1.State_STATE_GONE)
			return nil, err
		}
	}
	if time.Now().After(r.Claim.Deadline.AsTime()) {
		n.set(i, hearthv1.State_STATE_GONE)
		return nil, code(connect.CodeDeadlineExceeded, "too late")
	}
	i.Address = "10.0.0.1:8080"
	n.wins[i.Id] = append(n.wins[i.Id], r.Claim.Id)
	n.set(i, hearthv1.State_STATE_SERVING)
	res := &hearthv1.ActivateResponse{Instance: proto.CloneOf(i), Phases: []*hearthv1.Phase{{Name: "create"}}}
	n.results[r.Claim.Id] = res
	return res, n.leave("activate", r.InstanceId)
}

func (n *fakeNode) Freeze(ctx context.Context, r *hearthv1.FreezeRequest) (*hearthv1.Instance, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.enter(ctx, "freeze", r.InstanceId); err != nil {
		return nil, err
	}
	i := n.instances[r.InstanceId]
	switch {
	case n.old:
		return nil, code(connect.CodeUnimplemented, "freeze is not implemented")
	case r.Epoch != 0 && r.Epoch < n.epoch:
		return nil, code(connect.CodeFailedPrecondition, "epoch %d is older than %d", r.Epoch, n.epoch)
	case i == nil:
		return nil, code(connect.CodeNotFound, "no instance %s", r.InstanceId)
	}
	n.sleep(n.freezeTime)
	if n.instances[r.InstanceId] != i || i.State != hearthv1.State_STATE_SERVING {
		return nil, code(connect.CodeFailedPrecondition, "instance %s is %s", i.Id, i.State)
	}
	n.checkWins(i.Id)
	delete(n.wins, i.Id) // whoever had it has given it up
	n.freezes++
	n.set(i, hearthv1.State_STATE_FROZEN)
	return proto.CloneOf(i), n.leave("freeze", r.InstanceId)
}

func (n *fakeNode) Discard(ctx context.Context, r *hearthv1.DiscardRequest) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.enter(ctx, "discard", r.InstanceId); err != nil {
		return err
	}
	if r.Epoch != 0 && r.Epoch < n.epoch {
		return code(connect.CodeFailedPrecondition, "epoch %d is older than %d", r.Epoch, n.epoch)
	}
	if i := n.instances[r.InstanceId]; i != nil {
		n.set(i, hearthv1.State_STATE_DRAINING)
		n.sleep(10 * time.Millisecond)
		if n.instances[r.InstanceId] == i {
			n.set(i, hearthv1.State_STATE_GONE)
		}
	}
	n.discards = append(n.discards, r.InstanceId)
	return n.leave("discard", r.InstanceId)
}

func (n *fakeNode) Watch(ctx context.Context, epoch int64, event func(*hearthv1.WatchInstancesResponse) error) error {
	n.mu.Lock()
	n.sleep(n.watchTime)
	if n.dead {
		n.mu.Unlock()
		time.Sleep(time.Second)
		return connect.NewError(connect.CodeUnavailable, os.ErrDeadlineExceeded)
	}
	if n.down {
		n.mu.Unlock()
		return code(connect.CodeUnavailable, "connection refused")
	}
	n.epoch = max(n.epoch, epoch)
	events, broken := make(chan *hearthv1.WatchInstancesResponse, 10_000), make(chan struct{})
	for _, id := range slices.Sorted(maps.Keys(n.instances)) {
		events <- &hearthv1.WatchInstancesResponse{Event: &hearthv1.WatchInstancesResponse_Instance{Instance: proto.CloneOf(n.instances[id])}, Epoch: n.epoch}
	}
	events <- &hearthv1.WatchInstancesResponse{Event: &hearthv1.WatchInstancesResponse_Synced{Synced: true}, Epoch: n.epoch}
	n.watchers[events] = broken
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		delete(n.watchers, events)
		n.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-broken:
			return code(connect.CodeUnavailable, "connection reset")
		case e := <-events:
			if err := event(e); err != nil {
				return err
			}
		}
	}
}

func (n *fakeNode) PrepareRevision(ctx context.Context, r *hearthv1.PrepareRevisionRequest) (*hearthv1.PrepareRevisionResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.enter(ctx, "prepare", r.Revision.Name); err != nil {
		return nil, err
	}
	n.sleep(n.prepareTime)
	if n.broken != nil {
		if err := n.broken("prepare", nil, r.Revision.Image); err != nil {
			return nil, err
		}
	}
	n.prepared[r.Revision.Name]++
	n.images[r.Revision.Image] = true
	return &hearthv1.PrepareRevisionResponse{Image: "pinned@" + cmp.Or(r.Revision.Image, r.Revision.Code.GetPackage())}, n.leave("prepare", r.Revision.Name)
}

func (n *fakeNode) ForgetRevision(ctx context.Context, r *hearthv1.ForgetRevisionRequest) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.enter(ctx, "forget", r.Revision.Name); err != nil {
		return err
	}
	n.forgotten[r.Revision.Name] = r.RemoveImage
	return nil
}

func (n *fakeNode) ListImports(ctx context.Context, r *hearthv1.ListImportsRequest) (*hearthv1.ListImportsResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.enter(ctx, "imports", r.Runtime); err != nil {
		return nil, err
	}
	return proto.CloneOf(n.imports), nil
}

// has lists the images that were prepared.
func (n *fakeNode) has() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Sorted(maps.Keys(n.images))
}

// cut breaks every stream.
func (n *fakeNode) cut() {
	for w, broken := range n.watchers {
		close(broken)
		delete(n.watchers, w)
	}
}

// die is the end of the whole node, with all that is under way.
func (n *fakeNode) die() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dead = true
	n.cut()
}

// kill is kill -9 of the nodeagent, which is back after a while: what was not Warm or Serving is no more.
func (n *fakeNode) kill(away time.Duration) {
	n.mu.Lock()
	n.down = true
	n.cut()
	for id, i := range n.instances {
		if i.State != hearthv1.State_STATE_WARM && i.State != hearthv1.State_STATE_SERVING && i.State != hearthv1.State_STATE_FROZEN {
			delete(n.instances, id)
		}
	}
	n.mu.Unlock()
	time.Sleep(away)
	n.mu.Lock()
	n.down = false
	n.mu.Unlock()
}

// in counts Instances of a Function in a state; every Function for "*".
func (n *fakeNode) in(function string, s hearthv1.State) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	count := 0
	for _, i := range n.instances {
		if i.State == s && (function == "*" || i.Function == function) {
			count++
		}
	}
	return count
}

// booted counts the warm Instances of a Runtime.
func (n *fakeNode) booted(runtime string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	count := 0
	for _, i := range n.instances {
		if i.State == hearthv1.State_STATE_WARM && i.Runtime == runtime {
			count++
		}
	}
	return count
}

// preparations counts how often a Revision was prepared.
func (n *fakeNode) preparations(revision string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.prepared[revision]
}

// forgot says whether a Revision was forgotten, and whether with its image.
func (n *fakeNode) forgot(revision string) (image, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	image, ok = n.forgotten[revision]
	return image, ok
}

// made counts creations.
func (n *fakeNode) made() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.created
}

// on changes how the node behaves.
func (n *fakeNode) on(change func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change()
}

func (n *fakeNode) total() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.instances)
}

// check fails the test for every Instance that two claims got.
func (n *fakeNode) check() {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	for id := range n.wins {
		n.checkWins(id)
	}
}

func (n *fakeNode) checkWins(id string) {
	if claims := n.wins[id]; len(claims) != 1 {
		n.t.Errorf("instance %s was claimed by %v", id, claims)
	}
}

var errLost = connect.NewError(connect.CodeUnavailable, errors.New("answer lost"))
