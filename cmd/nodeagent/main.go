// Command nodeagent is Hearth on one node: containerd's snapshotter, which fetches and unpacks layers in parallel, and the
// engine of the node's Instances.
package main

import (
	"context"
	"errors"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/instance"
	"github.com/hearth-serverless/hearth/internal/bpf"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// options are what the flags say.
type options struct {
	node, root, socket, containerd, cgroup, snapshotterRoot, snapshotterSocket, hostsDir, dockerConfig, form string
	memory                                                                                                   int64
	limits                                                                                                   layer.Limits
}

func main() {
	o := &options{}
	os.Exit(daemon.Main(daemon.Service{
		Name:  "nodeagent",
		Short: "unpack images and keep instances on this node",
		Long: "nodeagent is containerd's proxy snapshotter, which fetches, decompresses and unpacks layers in parallel, and keeps\n" +
			"the node's instances. It may be restarted at any time: containers go on, and it finds them again.",
		Flags: o.flags,
		Run:   o.run,
	}))
}

func (o *options) flags(f *pflag.FlagSet) {
	f.StringVar(&o.node, "name", "node", "this node's name, the same after each start")
	f.StringVar(&o.root, "root", "/var/lib/hearth/node", "folder of logs and of files for instances")
	f.StringVar(&o.socket, "socket", "/run/hearth/node.sock", "Unix socket to serve on")
	f.StringVar(&o.containerd, "containerd-socket", "/run/containerd/containerd.sock", "containerd's socket")
	f.StringVar(&o.cgroup, "cgroup-parent", "/hearth", "cgroup that instances are made in")
	f.StringVar(&o.snapshotterRoot, "snapshotter-root", "/var/lib/hearth/snapshotter", "folder of layers and snapshots")
	f.StringVar(&o.snapshotterSocket, "snapshotter-socket", "/run/hearth/snapshotter.sock", "Unix socket to serve the snapshotter on")
	f.StringVar(&o.hostsDir, "hosts-dir", "", "folder of hosts.toml files for registries, as containerd's config_path")
	f.StringVar(&o.dockerConfig, "docker-config", "", "Docker's config.json with credentials for registries (default: $DOCKER_CONFIG or ~/.docker)")
	f.StringVar(&o.form, "layer-form", "auto", "keep new layers as one EROFS image each (erofs), as directories (directory), or as what the kernel can (auto)")
	daemon.BytesVar(f, &o.memory, "memory-budget", 128<<20, "memory for layers in flight, half of it for what is fetched and half for what is unpacked")
	f.Int64Var(&o.limits.MaxBytes, "layer-max-bytes", 0, "refuse a layer that unpacks to more; 0 is the default, 64 GiB")
	f.Int64Var(&o.limits.MaxRatio, "layer-max-ratio", 0, "refuse a layer that unpacks to so many times its size; 0 is the default, 200")
	f.Int64Var(&o.limits.MaxEntries, "layer-max-entries", 0, "refuse a layer with more files; 0 is the default, 5 million")
}

func (o *options) run(ctx context.Context, rt *daemon.Runtime) error {
	debug.SetMemoryLimit(o.memory + 64<<20) // garbage gives way before the node's memory does
	snaps, blobs, err := o.snapshotter(rt)
	if err != nil {
		return err
	}
	config := instance.Config{
		Node: o.node, Root: o.root, Address: o.containerd, CgroupParent: o.cgroup,
		Credentials: blobs.Credentials,
		Phases:      func(ref string) ([]instance.Phase, bool) { return phases(snaps, ref) },
		Logger:      rt.Log, Registerer: rt.Registry,
	}
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
	engine, err := instance.New(config)
	if err != nil {
		return errors.Join(err, snaps.Close())
	}
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewNodeServiceHandler(engine, connect.WithReadMaxBytes(4<<20)))
	group.Go(func() error { return o.serveSnapshots(ctx, snaps) })
	group.Go(func() error { return engine.Run(ctx) })
	group.Go(func() error { return daemon.ServeUnix(ctx, o.socket, mux) })
	group.Go(func() error { return followReadiness(ctx, rt.Ready, engine) })
	return group.Wait()
}

func (o *options) snapshotter(rt *daemon.Runtime) (*snapshotter.Snapshotter, *registry.Client, error) {
	blobs, err := registry.New(registry.Config{
		HostsDir: o.hostsDir, DockerConfig: o.dockerConfig, MemoryBytes: o.memory / 2, Logger: rt.Log, Registerer: rt.Registry,
	})
	if err != nil {
		return nil, nil, err
	}
	layers, err := layer.New(layer.Config{Limits: o.limits, MemoryBytes: o.memory / 2, Logger: rt.Log, Registerer: rt.Registry})
	if err != nil {
		return nil, nil, err
	}
	s, err := snapshotter.New(snapshotter.Config{Root: o.snapshotterRoot, Registry: blobs, Layers: layers, Form: snapshotter.Form(o.form), Logger: rt.Log, Registerer: rt.Registry})
	return s, blobs, err
}

// serveSnapshots serves containerd until ctx is done.
func (o *options) serveSnapshots(ctx context.Context, s *snapshotter.Snapshotter) error {
	listener, err := daemon.ListenUnix(ctx, o.snapshotterSocket)
	if err != nil {
		return errors.Join(err, s.Close())
	}
	server := grpc.NewServer()
	snapshotter.Register(server, s)
	defer context.AfterFunc(ctx, server.Stop)() // containerd asks again; a Prepare under way would hold up the end
	return errors.Join(server.Serve(listener), s.Close())
}

func phases(s *snapshotter.Snapshotter, ref string) ([]instance.Phase, bool) {
	pulled, ok := s.Trace(ref)
	var out []instance.Phase
	for _, p := range pulled {
		out = append(out, instance.Phase{Name: p.Name, Start: p.Start, Duration: p.Duration})
	}
	return out, ok
}

// followReadiness says how the engine stands with containerd, until ctx is done.
func followReadiness(ctx context.Context, ready *daemon.Readiness, engine *instance.Engine) error {
	for pause := 50 * time.Millisecond; ctx.Err() == nil; {
		err := engine.Ready(ctx)
		ready.Set("containerd", err)
		if err == nil {
			pause = time.Second
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil
}
