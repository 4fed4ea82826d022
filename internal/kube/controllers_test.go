package kube

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const namespace = "hearth"

// fakePool is what the controllers ask for, in memory: it does what it is told, or fails as it is told.
type fakePool struct {
	mu        sync.Mutex
	functions map[string]*hearthv1.Function
	runtimes  map[string]*hearthv1.Runtime
	pools     map[string]PoolStatus
	applies   int
	err       error
}

func newFakePool() *fakePool {
	return &fakePool{functions: map[string]*hearthv1.Function{}, runtimes: map[string]*hearthv1.Runtime{}, pools: map[string]PoolStatus{}}
}

// change does something to it while nobody else does.
func (p *fakePool) change(what func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	what()
}

func notFound(name string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("no %q", name))
}

func (p *fakePool) Apply(_ context.Context, req *connect.Request[hearthv1.ApplyRequest]) (*connect.Response[hearthv1.ApplyResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applies++
	f := proto.CloneOf(req.Msg.GetFunction())
	if runtime := f.GetSpec().GetRuntime(); runtime != "" && p.runtimes[runtime] == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("there is no runtime %q", runtime))
	}
	if p.err != nil {
		return nil, p.err
	}
	if f.Status = p.functions[f.GetName()].GetStatus(); f.Status == nil {
		f.Status = &hearthv1.FunctionStatus{Revision: f.GetName() + "-00001"}
	}
	p.functions[f.GetName()] = f
	return connect.NewResponse(&hearthv1.ApplyResponse{Function: proto.CloneOf(f)}), nil
}

func (p *fakePool) Get(_ context.Context, req *connect.Request[hearthv1.GetRequest]) (*connect.Response[hearthv1.GetResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.functions[req.Msg.GetName()]
	if f == nil {
		return nil, notFound(req.Msg.GetName())
	}
	return connect.NewResponse(&hearthv1.GetResponse{Function: proto.CloneOf(f)}), nil
}

func (p *fakePool) Delete(_ context.Context, req *connect.Request[hearthv1.DeleteRequest]) (*connect.Response[hearthv1.DeleteResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.functions[req.Msg.GetName()] == nil {
		return nil, notFound(req.Msg.GetName())
	}
	delete(p.functions, req.Msg.GetName())
	return nil, p.err
}

func (p *fakePool) Functions(...string) []*hearthv1.Function {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*hearthv1.Function
	for _, f := range p.functions {
		all = append(all, proto.CloneOf(f))
	}
	return all
}

func (p *fakePool) ApplyRuntime(_ context.Context, req *connect.Request[hearthv1.ApplyRuntimeRequest]) (*connect.Response[hearthv1.ApplyRuntimeResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applies++
	if p.err != nil {
		return nil, p.err
	}
	r := proto.CloneOf(req.Msg.GetRuntime())
	p.runtimes[r.GetName()] = r
	return connect.NewResponse(&hearthv1.ApplyRuntimeResponse{Runtime: proto.CloneOf(r)}), nil
}

func (p *fakePool) DeleteRuntime(_ context.Context, req *connect.Request[hearthv1.DeleteRuntimeRequest]) (*connect.Response[hearthv1.DeleteRuntimeResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.functions {
		if f.GetSpec().GetRuntime() == req.Msg.GetName() {
			return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("in use"))
		}
	}
	if p.runtimes[req.Msg.GetName()] == nil {
		return nil, notFound(req.Msg.GetName())
	}
	delete(p.runtimes, req.Msg.GetName())
	return connect.NewResponse(&hearthv1.DeleteRuntimeResponse{}), nil
}

func (p *fakePool) ListRuntimes(context.Context, *connect.Request[hearthv1.ListRuntimesRequest]) (*connect.Response[hearthv1.ListRuntimesResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	res := &hearthv1.ListRuntimesResponse{}
	for _, r := range p.runtimes {
		res.Runtimes = append(res.Runtimes, proto.CloneOf(r))
	}
	return connect.NewResponse(res), nil
}

func (p *fakePool) SetPool(w *crd.WarmPool) {
	p.change(func() {
		s := p.pools[w.Name]
		s.Desired = s.Nodes * int(w.Spec.Instances())
		p.pools[w.Name] = s
	})
}

func (p *fakePool) DeletePool(name string) { p.change(func() { delete(p.pools, name) }) }

func (p *fakePool) PoolNames() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.pools))
}

func (p *fakePool) PoolStatus(name string) (PoolStatus, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.pools[name]
	return s, ok
}

// kinds knows what is spoken of here.
func kinds() *runtime.Scheme {
	s := runtime.NewScheme()
	if err := errors.Join(clientscheme.AddToScheme(s), crd.AddToScheme(s)); err != nil {
		panic(err)
	}
	return s
}

// desk is an API server's stand-in with the controllers' hands.
type desk struct {
	objects
	t        *testing.T
	pool     *fakePool
	recorded *events.FakeRecorder
	writes   int
}

func newDesk(t *testing.T, given ...client.Object) *desk {
	d := &desk{t: t, pool: newFakePool(), recorded: events.NewFakeRecorder(20)}
	c := fake.NewClientBuilder().WithScheme(kinds()).WithObjects(given...).
		WithStatusSubresource(&crd.Function{}, &crd.Revision{}, &crd.Runtime{}, &crd.WarmPool{}).
		WithInterceptorFuncs(interceptor.Funcs{SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
			d.writes++
			return c.SubResource(sub).Patch(ctx, o, p, opts...)
		}}).Build()
	d.objects = objects{Client: c, live: c, events: d.recorded}
	return d
}

func (d *desk) functions() *functions {
	return &functions{objects: d.objects, pool: d.pool, url: func(name string) string { return "http://" + name + ".example" }, applied: map[types.NamespacedName]string{}}
}

// reconcile has a controller look at what has a name, and returns the result.
func (d *desk) reconcile(r reconcile.Reconciler, name string) reconcile.Result {
	d.t.Helper()
	result, err := r.Reconcile(d.t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Namespace: namespace, Name: name}})
	if err != nil {
		d.t.Fatal(err)
	}
	return result
}

func (d *desk) read(o client.Object, name string) {
	d.t.Helper()
	if err := d.Get(d.t.Context(), types.NamespacedName{Namespace: namespace, Name: name}, o); err != nil {
		d.t.Fatal(err)
	}
}

// events lists what was told since it was last asked.
func (d *desk) told() []string {
	var all []string
	for {
		select {
		case e := <-d.recorded.Events:
			all = append(all, e)
		default:
			return all
		}
	}
}

func (d *desk) wantCondition(conditions []metav1.Condition, kind, want string) {
	d.t.Helper()
	c := apimeta.FindStatusCondition(conditions, kind)
	if c == nil {
		d.t.Fatalf("there is no condition %s in %v", kind, conditions)
	}
	if got := fmt.Sprintf("%s %s: %s", c.Status, c.Reason, c.Message); !strings.HasPrefix(got, want) {
		d.t.Errorf("%s is %q, want %q", kind, got, want)
	}
}

func named(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, Generation: 1, UID: types.UID("uid-of-" + name)}
}

func hello() *crd.Function {
	return &crd.Function{ObjectMeta: named("hello"), Spec: crd.FunctionSpec{Image: "r.example/hello:1"}}
}

func TestFunctionIsAppliedOnceAndItsStatusWrittenWhenItDiffers(t *testing.T) {
	d := newDesk(t, hello())
	r := d.functions()
	d.reconcile(r, "hello")
	var f crd.Function
	d.read(&f, "hello")
	d.wantCondition(f.Status.Conditions, crd.ConditionAccepted, "True Accepted")
	d.wantCondition(f.Status.Conditions, crd.ConditionReady, "True ScaledToZero")
	if f.Status.ObservedGeneration != 1 || f.Status.LatestRevision != "hello-00001" || f.Status.URL != "http://hello.example" {
		t.Errorf("status is %+v", f.Status)
	}
	d.reconcile(r, "hello")
	if d.pool.applies != 1 || d.writes != 1 {
		t.Errorf("%d applies and %d writes for nothing new", d.pool.applies, d.writes)
	}

	d.pool.functions["hello"].Status = &hearthv1.FunctionStatus{Revision: "hello-00001", Ready: 2, Starting: 1, Desired: 3, Reason: "because"}
	d.reconcile(r, "hello")
	d.pool.functions["hello"].Status.Reason = "another sentence for the same"
	d.reconcile(r, "hello")
	d.read(&f, "hello")
	d.wantCondition(f.Status.Conditions, crd.ConditionReady, "True Serving")
	if f.Status.Ready != 2 || f.Status.Starting != 1 || f.Status.Desired != 3 || f.Status.Reason != "because" || d.writes != 2 || d.pool.applies != 1 {
		t.Errorf("status is %+v after %d writes and %d applies", f.Status, d.writes, d.pool.applies)
	}

	f.Spec.Image, f.Generation = "r.example/hello:2", 2
	if err := d.Update(t.Context(), &f); err != nil {
		t.Fatal(err)
	}
	d.reconcile(r, "hello")
	if got := d.pool.functions["hello"].GetSpec().GetImage(); got != "r.example/hello:2" {
		t.Errorf("the pool has image %s", got)
	}
	delete(d.pool.functions, "hello") // whatever the pool lost, it is given again
	d.reconcile(r, "hello")
	if d.pool.functions["hello"] == nil {
		t.Error("the pool has no function any more")
	}
	if told := d.told(); len(told) > 0 {
		t.Errorf("events %q", told)
	}
}

func TestFunctionThatIsGoneIsDeleted(t *testing.T) {
	going := hello()
	going.Name, going.Finalizers = "going", []string{"foregroundDeletion"}
	d := newDesk(t, hello(), going)
	r := d.functions()
	for _, name := range []string{"hello", "going"} {
		d.reconcile(r, name)
		o := &crd.Function{ObjectMeta: named(name)}
		if err := d.Client.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		d.reconcile(r, name)
		if d.pool.functions[name] != nil {
			t.Errorf("the pool still has %s", name)
		}
		d.reconcile(r, name) // and once more, as it may be
	}

	// One that still drains is none the less deleted.
	d.pool.functions["drains"] = &hearthv1.Function{}
	d.pool.err = connect.NewError(connect.CodeDeadlineExceeded, errors.New("instances drain"))
	d.reconcile(r, "drains")
}

// behind is a cache that has not heard of anything yet.
type behind struct{ client.Client }

func (b behind) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return apierrors.NewNotFound(schema.GroupResource{Group: "hearth.dev", Resource: "functions"}, "hello")
}

func TestACacheThatIsBehindDeletesNothing(t *testing.T) {
	d := newDesk(t, hello())
	d.pool.functions["hello"] = &hearthv1.Function{Name: "hello"}
	d.objects.Client = behind{d.objects.Client}
	d.reconcile(d.functions(), "hello")
	if d.pool.functions["hello"] == nil {
		t.Error("a function was deleted that the API server has")
	}
}

func TestSecretsAreReadAndFollowed(t *testing.T) {
	f := hello()
	f.Spec.Secrets = []crd.SecretFile{{Name: "key", SecretKeyRef: crd.SecretKeyRef{Name: "keys", Key: "api"}}}
	d := newDesk(t, f)
	r := d.functions()
	d.reconcile(r, "hello")
	d.read(f, "hello")
	d.wantCondition(f.Status.Conditions, crd.ConditionAccepted, `False SecretNotFound: spec.secrets: there is no Secret "keys" in namespace hearth`)
	d.wantCondition(f.Status.Conditions, crd.ConditionReady, `False SecretNotFound: it is not accepted`)
	if told := d.told(); len(told) != 1 || !strings.Contains(told[0], "Warning SecretNotFound") {
		t.Errorf("events %q", told)
	}

	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "keys"}, Data: map[string][]byte{"api": {}}}
	if err := d.Create(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	if got := r.usersOf(t.Context(), secret); len(got) != 1 || got[0].Name != "hello" {
		t.Errorf("its secret is used by %v", got)
	}
	d.reconcile(r, "hello")
	d.read(f, "hello")
	d.wantCondition(f.Status.Conditions, crd.ConditionAccepted, `False SecretNotFound: spec.secrets: Secret "keys" has no key "api", or nothing in it`)

	for _, value := range []string{"one", "two"} {
		secret.Data["api"] = []byte(value)
		if err := d.Update(t.Context(), secret); err != nil {
			t.Fatal(err)
		}
		d.reconcile(r, "hello")
		if got := string(d.pool.functions["hello"].GetSpec().GetSecrets()["key"]); got != value {
			t.Errorf("the pool has %q, want %q", got, value)
		}
	}
	d.read(f, "hello")
	d.wantCondition(f.Status.Conditions, crd.ConditionAccepted, "True")
	kept := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "keys", OwnerReferences: []metav1.OwnerReference{{Kind: "Revision", Controller: proto.Bool(true)}}}}
	if got := r.usersOf(t.Context(), kept); len(got) > 0 {
		t.Errorf("what a revision keeps is looked at for %v", got)
	}
}

func TestWhatIsWrongWithAFunctionIsSaid(t *testing.T) {
	for _, c := range []struct {
		name            string
		change          func(*crd.Function, *fakePool)
		accepted, ready string
		again           bool
		events          int
	}{
		{"refused", func(_ *crd.Function, p *fakePool) {
			p.err = connect.NewError(connect.CodeInvalidArgument, errors.New("spec.env: too large"))
		},
			"False Invalid: spec.env: too large", "False Invalid", false, 1},
		{"no runtime", func(f *crd.Function, _ *fakePool) { f.Spec.Image, f.Spec.Runtime = "", "cobol" },
			`False RuntimeNotFound: there is no runtime "cobol"`, "False RuntimeNotFound", true, 1},
		{"does not start", func(_ *crd.Function, p *fakePool) {
			p.functions["hello"] = &hearthv1.Function{Status: &hearthv1.FunctionStatus{Error: "no such image"}}
		}, "True", "False StartFailed: no such image", false, 1},
		{"a minimum that is not there yet", func(f *crd.Function, _ *fakePool) { f.Spec.Scaling.Min = 1 }, "True", "False Starting", false, 0},
		{"an error of endless length, and no UTF-8", func(_ *crd.Function, p *fakePool) {
			p.err = connect.NewError(connect.CodeInvalidArgument, errors.New("\xff"+strings.Repeat("ä", 1<<20)))
		}, "False Invalid: �ää", "False Invalid", false, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, pool := hello(), newFakePool()
			c.change(f, pool)
			d := newDesk(t, f)
			d.pool = pool
			result := d.reconcile(d.functions(), "hello")
			d.read(f, "hello")
			d.wantCondition(f.Status.Conditions, crd.ConditionAccepted, c.accepted)
			d.wantCondition(f.Status.Conditions, crd.ConditionReady, c.ready)
			if (result.RequeueAfter > 0) != c.again {
				t.Errorf("it is looked at again after %v", result.RequeueAfter)
			}
			for _, condition := range f.Status.Conditions {
				if len(condition.Message) > 2*maxMessage {
					t.Errorf("a message of %d bytes", len(condition.Message))
				}
			}
			if told := d.told(); len(told) != c.events {
				t.Errorf("events %q", told)
			}
		})
	}
}

func TestWhatMayPassIsTriedAgainAndNotWritten(t *testing.T) {
	d := newDesk(t, hello())
	d.pool.err = connect.NewError(connect.CodeUnavailable, errors.New("shutting down"))
	_, err := d.functions().Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Namespace: namespace, Name: "hello"}})
	if err == nil || d.writes > 0 {
		t.Errorf("error %v and %d writes", err, d.writes)
	}
}

func TestRuntimes(t *testing.T) {
	python := &crd.Runtime{ObjectMeta: named("python"), Spec: crd.RuntimeSpec{Image: "r.example/python:1"}}
	d := newDesk(t, python)
	r := &runtimes{objects: d.objects, pool: d.pool, applied: map[string]string{}}
	d.pool.err = connect.NewError(connect.CodeInvalidArgument, errors.New("preload: too many"))
	d.reconcile(r, "python")
	d.read(python, "python")
	d.wantCondition(python.Status.Conditions, crd.ConditionAccepted, "False Invalid: preload: too many")
	d.wantCondition(python.Status.Conditions, crd.ConditionReady, "False Invalid")

	d.pool.err = nil
	d.reconcile(r, "python")
	d.pool.runtimes["python"].Image = "r.example/python@sha256:0"
	d.pool.runtimes["python"].Status = &hearthv1.RuntimeStatus{Warm: 2, Error: "node a: exit status 1"}
	d.reconcile(r, "python")
	d.read(python, "python")
	d.wantCondition(python.Status.Conditions, crd.ConditionAccepted, "True")
	d.wantCondition(python.Status.Conditions, crd.ConditionReady, "False BootFailed: node a: exit status 1")
	if s := python.Status; s.Warm != 2 || s.Image != "r.example/python@sha256:0" || s.Error == "" || s.ObservedGeneration != 1 || d.pool.applies != 2 {
		t.Errorf("status is %+v after %d applies", s, d.pool.applies)
	}

	// It goes when the last Function that needs it has gone, in whatever order they were deleted.
	d.pool.functions["hello"] = &hearthv1.Function{Name: "hello", Spec: &hearthv1.FunctionSpec{Runtime: "python"}}
	if err := d.Client.Delete(t.Context(), python); err != nil {
		t.Fatal(err)
	}
	if d.reconcile(r, "python").RequeueAfter == 0 || d.pool.runtimes["python"] == nil {
		t.Error("a runtime that is in use was not to be deleted yet")
	}
	delete(d.pool.functions, "hello")
	if d.reconcile(r, "python").RequeueAfter != 0 || d.pool.runtimes["python"] != nil {
		t.Error("the runtime is still there")
	}
}

func TestWarmPools(t *testing.T) {
	two := int32(2)
	d := newDesk(t, &crd.WarmPool{ObjectMeta: named("all"), Spec: crd.WarmPoolSpec{Size: &two, NodeSelector: map[string]string{"a": "b"}}})
	r := &warmPools{objects: d.objects, pool: d.pool}
	for _, c := range []struct {
		is   PoolStatus
		want string
	}{
		{PoolStatus{}, "False NoNodes: no node that runs nodeagent has the labels map[a:b]"},
		{PoolStatus{Nodes: 3, Warm: 5}, "False Filling"},
		{PoolStatus{Nodes: 3, Warm: 6}, "True Stocked"},
		{PoolStatus{Nodes: 3, Warm: 1}, "True Stocked"}, // claims took the others
		{PoolStatus{Nodes: 3, Warm: 0}, "False Filling"},
		{PoolStatus{Nodes: 3, Warm: 5}, "False Filling"},
		{PoolStatus{Nodes: 3, Warm: 5, Error: "node a: disk full"}, "False Failing: node a: disk full"},
	} {
		d.pool.pools["all"] = c.is
		d.reconcile(r, "all")
		var wp crd.WarmPool
		d.read(&wp, "all")
		d.wantCondition(wp.Status.Conditions, crd.ConditionReady, c.want)
		if s := wp.Status; int(s.Nodes) != c.is.Nodes || int(s.Warm) != c.is.Warm || int(s.Desired) != c.is.Nodes*2 || s.Size != 2 || s.Selector != "hearth.dev/pool=all" {
			t.Errorf("status is %+v", s)
		}
	}
	if told := d.told(); len(told) != 2 { // no nodes, and the disk
		t.Errorf("events %q", told)
	}
	if err := d.Client.Delete(t.Context(), &crd.WarmPool{ObjectMeta: named("all")}); err != nil {
		t.Fatal(err)
	}
	d.reconcile(r, "all")
	if len(d.pool.pools) > 0 {
		t.Error("the pool is still kept")
	}
}

func TestRevisionIsReadyWhenItsBytesAreFixed(t *testing.T) {
	d := newDesk(t, &crd.Revision{ObjectMeta: named("hello-00001"), Spec: crd.RevisionSpec{Function: "hello", Image: "hello"}},
		&crd.Revision{ObjectMeta: named("code-00001"), Spec: crd.RevisionSpec{Function: "code", Runtime: "python", Code: &crd.Code{Package: "c@sha256:0"}}})
	r := &revisions{d.objects}
	var rev crd.Revision
	d.reconcile(r, "hello-00001")
	d.read(&rev, "hello-00001")
	d.wantCondition(rev.Status.Conditions, crd.ConditionReady, "Unknown Unresolved")
	rev.Status.Image = "hello@sha256:0"
	if err := d.Status().Update(t.Context(), &rev); err != nil {
		t.Fatal(err)
	}
	d.reconcile(r, "hello-00001")
	d.read(&rev, "hello-00001")
	d.wantCondition(rev.Status.Conditions, crd.ConditionReady, "True Resolved")
	d.reconcile(r, "code-00001")
	d.read(&rev, "code-00001")
	d.wantCondition(rev.Status.Conditions, crd.ConditionReady, "True Resolved")
}

func TestFollowTellsWhatChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex // guards what follows
		states, told, fails := map[string]int{"a": 1, "b": 1}, []string{}, false
		change := func(what func()) {
			mu.Lock()
			defer mu.Unlock()
			what()
		}
		look := func(context.Context) (map[string]int, error) {
			mu.Lock()
			defer mu.Unlock()
			if fails {
				return nil, errors.New("shutting down")
			}
			return maps.Clone(states), nil
		}
		done := make(chan error)
		go func() { done <- follow(ctx, look, func(name string) { change(func() { told = append(told, name) }) }) }()
		step := func(want ...string) {
			t.Helper()
			time.Sleep(lookEvery)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if diff := cmp.Diff(want, slices.Clone(told)); diff != "" {
				t.Errorf("-want +told:\n%s", diff)
			}
			told = nil
		}
		time.Sleep(time.Millisecond)
		step("a", "b")
		step()
		change(func() { states["b"]++; states["c"] = 0 })
		step("b", "c")
		change(func() { delete(states, "a"); fails = true })
		step()
		change(func() { fails = false })
		step("a")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
