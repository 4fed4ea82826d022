package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

const (
	// reconcileEvery is how often all is looked at although nothing was heard; reconcileRest is at least between two looks.
	reconcileEvery = 10 * time.Second
	reconcileRest  = 200 * time.Millisecond
	// apiQPS and apiBurst bound what is asked of the API server.
	apiQPS, apiBurst = 200, 400
)

// Config says how poolmanager works on a cluster.
type Config struct {
	// Kubeconfig is a file's path; empty is the pod's own account, or what kubectl would use.
	Kubeconfig string
	// Namespace has Functions, Revisions, Runtimes, WarmPools and Instances' pods; SystemNamespace the Lease and nodeagent's pods.
	Namespace, SystemNamespace string
	// Identity is unique among poolmanagers, and over their restarts.
	Identity string
	// HolderImage is what an Instance's pod runs before it is anybody's: the pause program.
	HolderImage string
	// Requests of an Instance's pod, where its WarmPool names none.
	Requests corev1.ResourceList
	NodePort int
	// Dial makes a client of the nodeagent at an address.
	Dial func(address string) *http.Client
	// Pool is what the Manager gets, but for nodes and store.
	Pool pool.Config
	// Lead serves with the Manager, and ends with ctx.
	Lead   func(ctx context.Context, m *pool.Manager) error
	Logger *slog.Logger
}

// Run takes part in the election with a cache that is up to date, and leads once it may. It ends when ctx or its term does.
func Run(ctx context.Context, c Config) error {
	config, err := restConfig(c.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = apiQPS, apiBurst
	scheme, err := newScheme()
	if err != nil {
		return err
	}
	direct, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("reach the API server: %w", err)
	}
	seen, err := cache.New(config, cacheOptions(c, scheme))
	if err != nil {
		return fmt.Errorf("make a cache of the cluster: %w", err)
	}
	cached, err := client.New(config, client.Options{Scheme: scheme, Cache: &client.CacheOptions{Reader: seen, DisableFor: []client.Object{&corev1.Secret{}, &corev1.ConfigMap{}}}})
	if err != nil {
		return fmt.Errorf("reach the API server: %w", err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return seen.Start(ctx) })
	group.Go(func() error {
		wake, err := watch(ctx, seen)
		if err != nil {
			return err
		}
		if !seen.WaitForCacheSync(ctx) {
			return ctx.Err()
		}
		elector := &Elector{client: direct, namespace: c.SystemNamespace, identity: c.Identity, log: c.Logger}
		return elector.Run(ctx, func(ctx context.Context, t *Term) error { return lead(ctx, c, t, cached, direct, wake) })
	})
	return group.Wait()
}

func newScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	return s, errors.Join(clientgoscheme.AddToScheme(s), crd.AddToScheme(s))
}

func restConfig(path string) (*rest.Config, error) {
	if path == "" {
		config, err := rest.InClusterConfig()
		if !errors.Is(err, rest.ErrNotInCluster) {
			return config, err
		}
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = path
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	return config, nil
}

// cacheOptions keep in memory what is Hearth's, and of that what is looked at.
func cacheOptions(c Config, scheme *runtime.Scheme) cache.Options {
	agents := labels.SelectorFromSet(labels.Set{nameLabel: NodeagentName})
	pods := map[string]cache.Config{c.Namespace: {}}
	if c.SystemNamespace != c.Namespace {
		pods[c.SystemNamespace] = cache.Config{LabelSelector: agents}
	}
	return cache.Options{
		Scheme: scheme, DefaultNamespaces: map[string]cache.Config{c.Namespace: {}},
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}:  {Namespaces: pods},
			&corev1.Node{}: {Transform: slimNode},
		},
	}
}

// slimNode leaves out of a node what is large and changes often.
func slimNode(o any) (any, error) {
	if n, ok := o.(*corev1.Node); ok {
		n.ManagedFields, n.Annotations = nil, nil
		n.Status = corev1.NodeStatus{Addresses: n.Status.Addresses}
	}
	return o, nil
}

// watch fills the cache, and tells of changes of nodes and pods. What comes while nobody listens is one reason to look.
func watch(ctx context.Context, seen cache.Cache) (<-chan struct{}, error) {
	wake := make(chan struct{}, 1)
	heard := func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	handler := toolscache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { heard() }, UpdateFunc: func(any, any) { heard() }, DeleteFunc: func(any) { heard() },
	}
	for _, kind := range []client.Object{&corev1.Node{}, &corev1.Pod{}, &crd.Function{}, &crd.Revision{}, &crd.Runtime{}, &crd.WarmPool{}} {
		informer, err := seen.GetInformer(ctx, kind)
		if err != nil {
			return nil, fmt.Errorf("watch the cluster: %w", err)
		}
		if _, err := informer.AddEventHandler(handler); err != nil {
			return nil, fmt.Errorf("watch the cluster: %w", err)
		}
	}
	return wake, nil
}

// lead is one term: a Manager over what the API server has, nodes and pods in step with it.
func lead(ctx context.Context, c Config, t *Term, cached client.Client, live client.Reader, wake <-chan struct{}) error {
	p := &pods{api: cached, live: live, namespace: c.Namespace, image: c.HolderImage, requests: c.Requests, log: c.Logger}
	a := newAdopter(p)
	config := c.Pool
	config.Store, config.Changed = newRecords(ctx, cached, live, c.Namespace, t), a.changed
	m, err := pool.New(config)
	if err != nil {
		return err
	}
	p.manager, p.pools = m, newPools(m)
	n := &nodes{api: cached, manager: m, pools: p.pools, pods: p, namespace: c.SystemNamespace, port: c.NodePort, dial: c.Dial, log: c.Logger,
		known: map[string]knownNode{}}
	if err := n.reconcile(ctx); err != nil { // a term begins with all that is there
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.Run(ctx) })
	group.Go(func() error { a.run(ctx); return nil })
	group.Go(func() error { keep(ctx, n, p, wake); return nil })
	group.Go(func() error { return c.Lead(ctx, m) })
	return group.Wait()
}

// keep brings nodes and pods in step whenever something changed, and now and then.
func keep(ctx context.Context, n *nodes, p *pods, wake <-chan struct{}) {
	ticker := time.NewTicker(reconcileEvery)
	defer ticker.Stop()
	for ctx.Err() == nil {
		err := errors.Join(n.reconcile(ctx), p.reconcile(ctx, time.Now()), p.headroom(ctx))
		if err != nil && ctx.Err() == nil {
			n.log.Warn("bring the pool and the cluster in step; it is tried again", "err", err)
		}
		pause(ctx, reconcileRest)
		select {
		case <-ctx.Done():
		case <-wake:
		case <-ticker.C:
		}
	}
}

// Resources is a Manager whose Functions and Runtimes are the cluster's objects: who asks for a change over RPC is told what to do.
type Resources struct{ *pool.Manager }

func elsewhere(what string) error {
	return connect.NewError(connect.CodeFailedPrecondition, errors.New("on Kubernetes "+what))
}

// Apply implements FunctionService.
func (Resources) Apply(context.Context, *connect.Request[hearthv1.ApplyRequest]) (*connect.Response[hearthv1.ApplyResponse], error) {
	return nil, elsewhere("a function is changed by its resource: apply a Function of hearth.dev/v1alpha1, with kubectl or `hearth deploy`")
}

// Delete implements FunctionService.
func (Resources) Delete(context.Context, *connect.Request[hearthv1.DeleteRequest]) (*connect.Response[hearthv1.DeleteResponse], error) {
	return nil, elsewhere("a function is deleted by its resource: `kubectl delete function.hearth.dev NAME`")
}

// ApplyRuntime implements RuntimeService.
func (Resources) ApplyRuntime(context.Context, *connect.Request[hearthv1.ApplyRuntimeRequest]) (*connect.Response[hearthv1.ApplyRuntimeResponse], error) {
	return nil, elsewhere("a runtime is changed by its resource: apply a Runtime of hearth.dev/v1alpha1")
}

// DeleteRuntime implements RuntimeService.
func (Resources) DeleteRuntime(context.Context, *connect.Request[hearthv1.DeleteRuntimeRequest]) (*connect.Response[hearthv1.DeleteRuntimeResponse], error) {
	return nil, elsewhere("a runtime is deleted by its resource: `kubectl delete runtime.hearth.dev NAME`")
}

// Requests reads what an Instance's pod requests where its WarmPool names nothing.
func Requests(cpu, memory string) (corev1.ResourceList, error) {
	out := corev1.ResourceList{}
	for name, text := range map[corev1.ResourceName]string{corev1.ResourceCPU: cpu, corev1.ResourceMemory: memory} {
		q, err := resource.ParseQuantity(text)
		if err != nil {
			return nil, fmt.Errorf("%s %q of an instance's pod: %w; for example 10m and 64Mi", name, text, err)
		}
		out[name] = q
	}
	return out, nil
}
