package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/pki"
	"github.com/hearth-serverless/hearth/pool"
)

const (
	// reconcileEvery is how often all is looked at although nothing was heard; reconcileRest is at least between two looks.
	reconcileEvery = 10 * time.Second
	reconcileRest  = 200 * time.Millisecond
	// apiQPS and apiBurst bound what is asked of the API server.
	apiQPS, apiBurst = 200, 400
)

// Poolmanager is how poolmanager works on a cluster. All must be set, but Kubeconfig.
type Poolmanager struct {
	// Kubeconfig is a file's path; empty is the pod's own account, or what kubectl would use.
	Kubeconfig string
	// Namespace has Functions, Revisions, Runtimes, WarmPools and Instances' pods; SystemNamespace the Lease, nodeagent's pods and the
	// certificates.
	Namespace, SystemNamespace string
	// Identity is unique among poolmanagers, and over their restarts.
	Identity string
	// HolderImage is what an Instance's pod runs before it is anybody's: the pause program.
	HolderImage string
	// Requests of an Instance's pod, where its WarmPool names none.
	Requests corev1.ResourceList
	NodePort int
	// PrepareNodes is the Manager's.
	PrepareNodes int
	// TLSDir is where the certificate is written that nodes and gateways know it by.
	TLSDir string
	// URL of a Function at the gateway.
	URL func(function string) string
	// Pool is what the Manager gets, but for nodes and store; WarmPools say what waits.
	Pool pool.Config
	// Serve is called once there is a certificate, and Lead when there is a Manager. Both end with ctx.
	Serve func(ctx context.Context) error
	Lead  func(ctx context.Context, m *pool.Manager) error

	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Run takes part in the election with a cache that is up to date, and leads once it may. It ends when ctx or its term does.
func (c Poolmanager) Run(ctx context.Context) error {
	config, err := restConfig(c.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = apiQPS, apiBurst
	log.SetLogger(logr.FromSlogHandler(c.Logger.Handler()))
	scheme := NewScheme()
	cluster, err := manager.New(config, manager.Options{Scheme: scheme, Cache: c.cacheOptions(scheme), Metrics: metricsserver.Options{BindAddress: "0"},
		Logger: logr.FromSlogHandler(c.Logger.Handler())})
	if err != nil {
		return fmt.Errorf("reach the API server: %w", err)
	}
	direct, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("reach the API server: %w", err)
	}
	certificates := NewCertificates(CertificatesConfig{Client: direct, Namespace: c.SystemNamespace, Dir: c.TLSDir, Logger: c.Logger, Registerer: c.Registerer})
	if err := certificates.Ensure(ctx); err != nil {
		c.Logger.Error("certificates cannot be kept", "err", err) // what is in the folder may do
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return certificates.Run(ctx) })
	group.Go(func() error { return cluster.Start(ctx) })
	group.Go(func() error { return c.Serve(ctx) })
	group.Go(func() error {
		wake, err := hear(ctx, cluster.GetCache())
		if err != nil {
			return err
		}
		if !cluster.GetCache().WaitForCacheSync(ctx) {
			return ctx.Err()
		}
		elector := &Elector{client: direct, namespace: c.SystemNamespace, identity: c.Identity, log: c.Logger}
		return elector.Run(ctx, func(ctx context.Context, t *Term) error { return c.lead(ctx, t, cluster, wake) })
	})
	return group.Wait()
}

// NewScheme knows Kubernetes' kinds and Hearth's.
func NewScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	utilruntime.Must(errors.Join(clientgoscheme.AddToScheme(s), crd.AddToScheme(s))) // they are compiled in
	return s
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
func (c Poolmanager) cacheOptions(scheme *runtime.Scheme) cache.Options {
	agents := labels.SelectorFromSet(labels.Set{componentLabel: NodeagentComponent})
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

// hear fills the cache, and tells of changes of nodes and pods. What comes while nobody listens is one reason to look.
func hear(ctx context.Context, seen cache.Cache) (<-chan struct{}, error) {
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

// lead is one term: a Manager over what the API server has, nodes and pods in step with it, and the controllers.
func (c Poolmanager) lead(ctx context.Context, t *Term, cluster manager.Manager, wake <-chan struct{}) error {
	cached, live := cluster.GetClient(), cluster.GetAPIReader()
	p := &pods{api: cached, live: live, namespace: c.Namespace, image: c.HolderImage, requests: c.Requests, log: c.Logger}
	a := newAdopter(p)
	config := c.Pool
	config.PoolSize, config.PrepareNodes = -1, c.PrepareNodes
	config.Store, config.Changed = newRecords(ctx, cached, live, c.Namespace, t), a.changed
	m, err := pool.New(config)
	if err != nil {
		return err
	}
	keys, err := pki.OpenDir(c.TLSDir, c.Logger)
	if err != nil {
		return err
	}
	dial := func(address string) *http.Client { return daemon.TLSClient(keys, pki.Nodeagent, address) }
	p.manager, p.pools = m, newPools(m)
	n := &nodes{api: cached, manager: m, pools: p.pools, pods: p, namespace: c.SystemNamespace, port: c.NodePort, dial: dial, log: c.Logger,
		known: map[string]knownNode{}}
	if err := errors.Join(p.pools.load(ctx, cached, c.Namespace), n.reconcile(ctx)); err != nil { // a term begins with all that is there
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.Run(ctx) })
	group.Go(func() error { a.run(ctx); return nil })
	group.Go(func() error { keep(ctx, n, p, wake); return nil })
	group.Go(func() error { return c.Lead(ctx, m) })
	group.Go(func() error {
		controllers := Controllers{Namespace: c.Namespace, Functions: m, Runtimes: m, Pools: p.pools, URL: c.URL, Logger: c.Logger}
		return controllers.Run(ctx, cluster.GetConfig(), cluster.GetScheme(), cluster.GetCache())
	})
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

// requestsFrom reads what an Instance's pod requests where its WarmPool names nothing.
func requestsFrom(cpu, memory string) (corev1.ResourceList, error) {
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
