// Command poolmanager owns claims, warm pools, Functions, Runtimes and the scaling loop. It serves AllocationService, FunctionService,
// RuntimeService and LoadService on a Unix socket, and works on nodes through theirs.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/pki"
	"github.com/hearth-serverless/hearth/pool"
	"github.com/hearth-serverless/hearth/pool/store"
	"github.com/hearth-serverless/hearth/scaler"
)

// maxRequestBytes bounds one request: a report of a gateway with some ten thousand instances.
const maxRequestBytes = 8 << 20

// options are what the flags say.
type options struct {
	rpcSocket    string
	nodeSockets  []string
	network      daemon.Network
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
	nodes, err := o.nodes()
	if err != nil {
		return err
	}
	db, err := store.Open(o.store)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	manager, err := pool.New(pool.Config{
		Nodes: nodes, Store: db, PoolSize: withNone(o.poolSize), Snapshots: o.snapshots, NodeTimeout: o.nodeTimeout,
		ClaimsPerNode: o.claims, PodWorkers: o.podWorkers, PodMemoryBytes: o.podMemory, FrozenTTL: withNone(o.frozenTTL), DrainTimeout: o.drainTimeout, Logger: rt.Log, Registerer: rt.Registry,
		Ready: func(err error) { rt.Ready.Set("nodes", err) },
	})
	if err != nil {
		return err
	}
	loop, err := scaler.New(scaler.Config{Pool: manager, Utilisation: o.utilisation, Logger: rt.Log, Registerer: rt.Registry})
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	// What crosses no network is not compressed, as it would be for every client that could read it.
	bound := connect.WithHandlerOptions(connect.WithReadMaxBytes(maxRequestBytes), connect.WithCompression("gzip", nil, nil))
	mux.Handle(hearthv1connect.NewAllocationServiceHandler(manager, bound))
	mux.Handle(hearthv1connect.NewFunctionServiceHandler(manager, bound))
	mux.Handle(hearthv1connect.NewRuntimeServiceHandler(manager, bound))
	mux.Handle(hearthv1connect.NewLoadServiceHandler(loop, bound))

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return manager.Run(ctx) })
	group.Go(func() error { return loop.Run(ctx) })
	group.Go(func() error { return daemon.ServeUnix(ctx, o.rpcSocket, mux) })
	group.Go(func() error { return o.network.Serve(ctx, rt.Log, mux, pki.Gateway, pki.Admin) })
	return group.Wait()
}

// withNone: zero of the flag means none, zero of the Config means the default.
func withNone[N int | time.Duration](n N) N {
	if n == 0 {
		return -1
	}
	return n
}
