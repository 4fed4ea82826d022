// Command poolmanager owns claims, warm pools, Functions, Runtimes and the scaling loop. It serves AllocationService, FunctionService,
// RuntimeService and LoadService on a Unix socket, and works on nodes through theirs.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/kube"
	"github.com/hearth-serverless/hearth/pool"
	"github.com/hearth-serverless/hearth/pool/store"
	"github.com/hearth-serverless/hearth/scaler"
)

// options are what the flags say.
type options struct {
	rpcSocket    string
	nodeSockets  []string
	network      daemon.Network
	cluster      kube.Options
	store        string
	poolSize     int
	claims       int
	frozenTTL    time.Duration
	podWorkers   int
	podMemory    int64
	snapshots    int
	nodeTimeout  time.Duration
	drainTimeout time.Duration
	utilisation  float64
}

func main() {
	o := &options{}
	os.Exit(daemon.Main(daemon.Service{
		Name:  "poolmanager",
		Short: "own claims, warm pools, functions and scaling",
		Long: "poolmanager keeps warm instances on every node, hands them to gateways, keeps functions, and scales them.\n" +
			"A start takes the warmest that there is: an instance of the function that was frozen when it was not needed, one in which\n" +
			"its runtime is booted (`hearth runtime apply NAME --warm N`), an empty sandbox (--pool-size), or a new one.\n" +
			"Functions and runtimes are in the store and survive everything; claims and instances are known to the nodes.",
		Flags: o.flags,
		Run:   o.run,
	}))
}

func (o *options) flags(f *pflag.FlagSet) {
	f.StringVar(&o.rpcSocket, "rpc-socket", "/run/hearth/pool.sock", "Unix socket to serve on")
	o.network.Flags(f)
	o.cluster.Flags(f)
	f.StringArrayVar(&o.nodeSockets, "node-socket", []string{"node=/run/hearth/node.sock"}, "NAME=PATH of a nodeagent's socket; may be repeated")
	f.StringVar(&o.store, "store", "/var/lib/hearth/pool.db", "file of functions; made if there is none")
	f.IntVar(&o.poolSize, "pool-size", pool.DefaultPoolSize, "empty sandboxes that each node keeps, for images and for runtimes of which none is booted; runtimes have their own number")
	f.IntVar(&o.claims, "claims-per-node", pool.DefaultClaimsPerNode, "starts that may be under way on a node at once, three quarters of them of one function; lower it where starts slow each other down")
	f.DurationVar(&o.frozenTTL, "frozen-ttl", time.Hour, "how long an instance that is not needed stays frozen, for a start within milliseconds; 0 freezes none, which saves their memory")
	f.IntVar(&o.podWorkers, "pod-workers", pool.DefaultPodWorkers, "instances that functions of one group may have in one pod")
	daemon.BytesVar(f, &o.podMemory, "pod-memory", pool.DefaultPodMemoryBytes, "sum of the memory limits of a group's functions in one pod; one that names none counts as 1Gi")
	f.IntVar(&o.snapshots, "snapshots", 0, "snapshots of each revision that a node keeps prepared; 0 is the default, negative is none")
	f.DurationVar(&o.nodeTimeout, "node-timeout", 30*time.Second, "how long the instances of a node that cannot be reached get traffic")
	f.DurationVar(&o.drainTimeout, "drain-timeout", 30*time.Second, "bound of a drain, on top of the function's own timeout")
	f.Float64Var(&o.utilisation, "utilisation", scaler.DefaultUtilisation, "share of an instance's concurrency that scaling aims at")
}

// nodes parses --node-socket.
func (o *options) nodes() (map[string]pool.Node, error) {
	nodes := map[string]pool.Node{}
	for _, s := range o.nodeSockets {
		name, path, ok := strings.Cut(s, "=")
		if !ok || name == "" || path == "" {
			return nil, fmt.Errorf("--node-socket %q: want NAME=PATH, for example node=/run/hearth/node.sock", s)
		}
		if nodes[name] != nil {
			return nil, fmt.Errorf("--node-socket %q: there are two nodes of that name", s)
		}
		nodes[name] = pool.Connect(hearthv1connect.NewNodeServiceClient(daemon.UnixClient(path), "http://hearth"))
	}
	return nodes, nil
}

func (o *options) run(ctx context.Context, rt *daemon.Runtime) (err error) {
	if o.cluster.Enabled {
		return o.runOnCluster(ctx, rt)
	}
	c := o.pool(rt)
	if c.Nodes, err = o.nodes(); err != nil {
		return err
	}
	db, err := store.Open(o.store)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	c.Store, c.PoolSize = db, withNone(o.poolSize)
	c.Ready = func(err error) { rt.Ready.Set("nodes", err) }
	manager, err := pool.New(c)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	gate := &kube.Gate{}
	group.Go(func() error { return manager.Run(ctx) })
	group.Go(func() error { return gate.Lead(ctx, o.scaler(manager, rt), manager) })
	group.Go(func() error { return gate.Serve(ctx, rt.Log, o.rpcSocket, o.network) })
	return group.Wait()
}

func (o *options) runOnCluster(ctx context.Context, rt *daemon.Runtime) error {
	p, err := o.cluster.Poolmanager()
	if err != nil {
		return err
	}
	gate := &kube.Gate{}
	p.TLSDir, p.Logger, p.Registerer, p.Pool = o.network.TLSDir, rt.Log, rt.Registry, o.pool(rt)
	p.Serve = func(ctx context.Context) error {
		rt.Ready.Set("serving", nil) // a standby is ready to take over
		return gate.Serve(ctx, rt.Log, o.rpcSocket, o.network)
	}
	p.Lead = func(ctx context.Context, m *pool.Manager) error {
		return gate.Lead(ctx, o.scaler(m, rt), kube.Resources{Manager: m})
	}
	return p.Run(ctx)
}

func (o *options) pool(rt *daemon.Runtime) pool.Config {
	return pool.Config{
		Snapshots: o.snapshots, NodeTimeout: o.nodeTimeout, ClaimsPerNode: o.claims, PodWorkers: o.podWorkers, PodMemoryBytes: o.podMemory,
		FrozenTTL: withNone(o.frozenTTL), DrainTimeout: o.drainTimeout, Logger: rt.Log, Registerer: rt.Registry,
	}
}

func (o *options) scaler(m *pool.Manager, rt *daemon.Runtime) scaler.Config {
	return scaler.Config{Pool: m, Utilisation: o.utilisation, Logger: rt.Log, Registerer: rt.Registry}
}

// withNone: zero of the flag means none, zero of the Config means the default.
func withNone[N int | time.Duration](n N) N {
	if n == 0 {
		return -1
	}
	return n
}
