// Command nodeagent is Hearth on one node: containerd's snapshotter, which fetches and unpacks layers in parallel, and the
// engine of the node's Instances.
package main

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"

	"connectrpc.com/connect"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/instance"
	"github.com/hearth-serverless/hearth/internal/bpf"
	"github.com/hearth-serverless/hearth/internal/contentstore"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/internal/images"
	"github.com/hearth-serverless/hearth/internal/keychain"
	"github.com/hearth-serverless/hearth/internal/pki"
	"github.com/hearth-serverless/hearth/internal/register"
	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// options are what the flags say.
type options struct {
	node, root, socket, containerd, cgroup, snapshotterSocket, imageSocket, hostsDir, dockerConfig string
	network                                                                                        daemon.Network
	keepBlobs                                                                                      bool
	memory                                                                                         int64
	limits                                                                                         layer.Limits
	snaps                                                                                          snapshotter.Config
	engine                                                                                         instance.Config
	ahead                                                                                          prefetch.Config
}

func main() {
	o := &options{}
	os.Exit(daemon.Main(daemon.Service{
		Name: "nodeagent", Short: "unpack images and keep instances on this node", Flags: o.flags, Run: o.run, Commands: register.Commands(),
		Long: "nodeagent is containerd's proxy snapshotter, and keeps the node's instances. It may be restarted at any time: containers go on.",
	}))
}

func (o *options) flags(f *pflag.FlagSet) {
	f.StringVar(&o.node, "name", "node", "this node's name, the same after each start")
	f.StringVar(&o.root, "root", "/var/lib/hearth/node", "folder of logs and of files for instances")
	f.StringVar(&o.socket, "socket", "/run/hearth/node.sock", "Unix socket to serve on")
	o.network.Flags(f)
	f.StringVar(&o.containerd, "containerd-socket", "/run/containerd/containerd.sock", "containerd's socket")
	f.StringVar(&o.cgroup, "cgroup-parent", "/hearth", "cgroup that instances are made in")
	f.StringVar(&o.snapshotterSocket, "snapshotter-socket", "/run/hearth/snapshotter.sock", "Unix socket to serve the snapshotter on")
	f.StringVar(&o.imageSocket, "image-service-socket", "", "Unix socket to serve the CRI's ImageService on, for the kubelet's --image-service-endpoint: its pull secrets then serve here too, and layers are fetched before containerd takes its locks (default: none)")
	f.StringVar(&o.hostsDir, "hosts-dir", "", "folder of hosts.toml files for registries, as containerd's config_path")
	f.StringVar(&o.dockerConfig, "docker-config", "", "Docker's config.json with credentials for registries (default: $DOCKER_CONFIG or ~/.docker)")
	daemon.BytesVar(f, &o.memory, "memory-budget", 128<<20, "memory for layers in flight, fetched and unpacked; nodeagent takes some 30 MiB besides")
	f.BoolVar(&o.keepBlobs, "keep-blobs", false, "keep the compressed layers in containerd's content store too, for ctr images export, mirrors and pushing")
	for _, part := range []interface{ Flags(*pflag.FlagSet) }{&o.limits, &o.snaps, &o.engine, &o.ahead} {
		part.Flags(f)
	}
}

func (o *options) run(ctx context.Context, rt *daemon.Runtime) error {
	secrets, err := keychain.New(o.containerd, rt.Log)
	if err != nil {
		return err
	}
	snaps, blobs, err := o.snapshotter(rt, secrets)
	if err != nil {
		return err
	}
	config := o.engine
	config.Node, config.Root, config.Address, config.CgroupParent = o.node, o.root, o.containerd, o.cgroup
	config.Credentials, config.Fetch = blobs.Credentials, snaps.Fetch
	config.Phases = func(ref string) ([]instance.Phase, bool) { return phases(snaps, ref) }
	config.Logger, config.Registerer = rt.Log, rt.Registry
	group, ctx := errgroup.WithContext(ctx)
	if listens, err := bpf.NewListenWatcher(rt.Log); err != nil {
		rt.Log.Warn("the kernel does not tell when functions listen, they are asked instead", "reason", err)
	} else {
		config.Listens = listens
		group.Go(func() error {
			if err := listens.Run(ctx); err != nil { // the engine looks for itself now and then
				rt.Log.Error("the kernel does not tell when functions listen any more", "error", err)
			}
			return nil
		})
	}
	o.ahead.Root, o.ahead.Logger, o.ahead.Registerer = filepath.Join(o.root, "profiles"), rt.Log, rt.Registry
	o.ahead.Short = func() (bool, error) { return host.ShortOfMemory("/proc", o.engine.MemoryPressure) }
	o.ahead.Trace(rt.Log)
	ahead, aheadErr := prefetch.New(o.ahead)
	config.Prefetch = ahead
	engine, engineErr := instance.New(config)
	pulls, err := images.New(images.Config{Containerd: o.containerd, Credentials: blobs.Credentials, Fetch: snaps.Fetch, Progress: snaps.Pull})
	if err = errors.Join(aheadErr, engineErr, err); err != nil {
		return errors.Join(err, snaps.Close())
	}
	mux := http.NewServeMux()
	plain := connect.WithCompression("gzip", nil, nil) // what crosses no network is not worth it
	mux.Handle(hearthv1connect.NewImageServiceHandler(pulls, plain, connect.WithReadMaxBytes(1<<20)))
	mux.Handle(hearthv1connect.NewNodeServiceHandler(engine, plain, connect.WithReadMaxBytes(4<<20)))
	group.Go(func() error { return snaps.Serve(ctx, o.snapshotterSocket) })
	group.Go(func() error { return secrets.Serve(ctx, o.imageSocket, snaps.Fetch) })
	group.Go(func() error { return engine.Run(ctx) })
	group.Go(func() error { return ahead.Run(ctx) })
	group.Go(func() error { return daemon.ServeUnix(ctx, o.socket, mux) })
	group.Go(func() error { return o.network.Serve(ctx, rt.Log, mux, pki.Poolmanager, pki.Admin) })
	group.Go(func() error { return rt.Ready.Follow(ctx, "containerd", engine.Ready) })
	return group.Wait()
}

func (o *options) snapshotter(rt *daemon.Runtime, secrets *keychain.Service) (*snapshotter.Snapshotter, *registry.Client, error) {
	unpacked, fetched := layer.Share(o.memory)
	limit := func(lent int64) { debug.SetMemoryLimit(24<<20 + o.memory/8 + lent) } // garbage gives way before the node's memory does
	blobs, err := registry.New(registry.Config{
		HostsDir: o.hostsDir, DockerConfig: o.dockerConfig, Keychain: secrets.Credentials, MemoryBytes: fetched, Logger: rt.Log, Registerer: rt.Registry,
	})
	if err != nil {
		return nil, nil, err
	}
	layers, err := layer.New(layer.Config{Limits: o.limits, MemoryBytes: unpacked, Lent: limit, Logger: rt.Log, Registerer: rt.Registry})
	if err != nil {
		return nil, nil, err
	}
	if o.keepBlobs {
		if o.snaps.Blobs, err = contentstore.New(o.containerd); err != nil {
			return nil, nil, err
		}
	}
	o.snaps.Registry, o.snaps.Layers, o.snaps.Logger, o.snaps.Registerer = blobs, layers, rt.Log, rt.Registry
	s, err := snapshotter.New(o.snaps)
	return s, blobs, err
}

func phases(s *snapshotter.Snapshotter, ref string) (out []instance.Phase, ok bool) {
	pulled, ok := s.Trace(ref)
	for _, p := range pulled {
		out = append(out, instance.Phase{Name: p.Name, Start: p.Start, Duration: p.Duration})
	}
	return out, ok
}
