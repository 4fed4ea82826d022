package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

// starter brings a system up with its data in dir.
type starterFunc func(ctx context.Context, o *Options, dir, registry string) (*node, error)

// systems that a pull can be measured with.
func systems() map[string]starterFunc {
	return map[string]starterFunc{
		"hearth":           startHearth,
		"containerd":       startContainerd(containerdOptions{}),
		"containerd-tuned": startContainerd(containerdOptions{Tuned: true}),
		"soci":             startBeside("soci", startSOCI),
		"stargz":           startBeside("stargz", startStargz),
	}
}

// Systems by name: hearth, and its peers.
func Systems() []string {
	return []string{"hearth", "containerd", "containerd-tuned", "soci", "stargz"}
}

// about says what a peer is set to, for the report.
func about(system string) string {
	switch system {
	case "containerd":
		return "containerd: as it comes, with Go's own gzip (a machine that has igzip or unpigz on its PATH gets containerd-tuned's)"
	case "containerd-tuned":
		return "containerd-tuned: transfer.max_concurrent_downloads 10, concurrent_layer_fetch_buffer 8 MiB, max_concurrent_unpacks 4; decompressor " + decompressor()
	case "soci":
		return "soci: 0.16.1, parallel pull and unpack, 10 downloads of 8 MiB chunks and 4 unpacks an image, layers discarded once unpacked; decompressor " + decompressor()
	case "stargz":
		return "stargz: 0.19.1, on images that are not converted, which it leaves to containerd to unpack into its snapshots"
	}
	return ""
}

// decompressor that the tuned peers have for gzip.
func decompressor() string {
	for _, name := range []string{"igzip", "unpigz"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return "Go's own gzip: neither igzip nor unpigz is installed"
}

// pullSystems are those that were asked for, or the usual ones. Peers that have to be compiled are, unless the run is a quick one.
func (o *Options) pullSystems(ctx context.Context, r *Report) ([]string, error) {
	chosen := o.Systems
	if len(chosen) == 0 {
		chosen = []string{"hearth", "containerd", "containerd-tuned", "soci"}
		if o.Quick {
			chosen = []string{"hearth", "containerd", "soci"}
		}
		if _, err := os.Stat(o.peer("soci-snapshotter-grpc")); o.Quick && err != nil {
			chosen = []string{"hearth", "containerd"}
			r.note("soci is left out: a quick run does not wait for its compiler; run `make peers` once")
		}
	}
	for _, name := range chosen {
		if !slices.Contains(Systems(), name) {
			return nil, fmt.Errorf("there is no system %q: choose of %v", name, Systems())
		}
	}
	if slices.Contains(chosen, "soci") || slices.Contains(chosen, "stargz") {
		if err := o.buildPeers(ctx); err != nil {
			return nil, err
		}
	}
	for _, name := range chosen {
		if text := about(name); text != "" {
			r.note(text)
		}
	}
	r.note("left out: nydus and overlaybd, whose daemons in Rust and C++ are in no Go module or Debian package")
	return chosen, nil
}

// peer is the path of a program of the peers'.
func (o *Options) peer(name string) string { return filepath.Join(o.Cache, "tools", "peers", name) }

// buildPeers compiles what the peers lack, by the script that is there for it.
func (o *Options) buildPeers(ctx context.Context) error {
	if _, err := os.Stat(o.peer("soci-snapshotter-grpc")); err == nil {
		return nil
	}
	script := filepath.Join(filepath.Dir(o.Bin), "tools", "build")
	if _, err := os.Stat(script); err != nil {
		return fmt.Errorf("the peers are not in %s: run `make peers`", filepath.Dir(o.peer("")))
	}
	o.say("compiling the peers; this takes some minutes once")
	cmd := exec.CommandContext(ctx, script, "peers")
	cmd.Env = append(os.Environ(), "HEARTH_CACHE="+o.Cache)
	cmd.Stderr = o.Progress
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("compile the peers: %w", err)
	}
	return nil
}

// containerdOptions of one that stands beside others. The rest is as containerd has it.
type containerdOptions struct {
	// Tuned sets what containerd has for parallel pulls, which is off by default.
	Tuned bool
	// Proxy is a snapshotter that serves containerd on ProxySocket; empty for overlayfs.
	Proxy, ProxySocket string
}

const containerdConfig = `version = 3
root = {{json .Root}}
state = {{json .State}}
[grpc]
  address = {{json .Socket}}
[ttrpc]
  address = {{.Socket | printf "%s.ttrpc" | json}}
[plugins.'io.containerd.internal.v1.opt']
  path = {{json .Opt}}
{{- if .Tuned}}
[plugins.'io.containerd.transfer.v1.local']
  max_concurrent_downloads = 10
  concurrent_layer_fetch_buffer = 8388608
  max_concurrent_unpacks = 4
{{- end}}
{{- if .Proxy}}
[proxy_plugins.{{.Proxy}}]
  type = "snapshot"
  address = {{json .ProxySocket}}
  [proxy_plugins.{{.Proxy}}.exports]
    root = {{json .Root}}
[plugins.'io.containerd.cri.v1.images']
  snapshotter = {{json .Proxy}}
  # The path of a pull by which a snapshotter is told of the image in annotations.
  disable_snapshot_annotations = false
{{- end}}
`

func startContainerd(options containerdOptions) starterFunc {
	return func(ctx context.Context, o *Options, dir, _ string) (*node, error) {
		n := &node{tools: o.Tools, dir: dir, socket: filepath.Join(dir, "c.sock"), snapshotter: "overlayfs"}
		if options.Proxy != "" {
			n.snapshotter = options.Proxy
		}
		config := filepath.Join(dir, "config.toml")
		err := render(config, containerdConfig, map[string]any{
			"Root": filepath.Join(dir, "root"), "State": filepath.Join(dir, "state"), "Opt": filepath.Join(dir, "opt"),
			"Socket": n.socket, "Tuned": options.Tuned, "Proxy": options.Proxy, "ProxySocket": options.ProxySocket,
		})
		if err != nil {
			return nil, err
		}
		var env []string
		if !options.Tuned {
			env = []string{"CONTAINERD_DISABLE_IGZIP=1", "CONTAINERD_DISABLE_PIGZ=1"}
		}
		p, err := startProcess(dir, env, filepath.Join(o.Tools, "containerd"), "--config", config)
		if err != nil {
			return nil, err
		}
		n.stop = func() error { p.stop(); return nil }
		n.processes = func() ([]int, error) { return []int{p.cmd.Process.Pid}, nil }
		if err := p.await(ctx, "unix", n.socket); err != nil {
			return nil, errors.Join(err, n.stop())
		}
		return n, nil
	}
}

// startBeside starts a snapshotter of the peers', and a containerd that uses it.
func startBeside(name string, start func(o *Options, dir, socket, registry string) (*process, error)) starterFunc {
	return func(ctx context.Context, o *Options, dir, registry string) (*node, error) {
		socket := filepath.Join(dir, "s.sock")
		p, err := start(o, dir, socket, registry)
		if err != nil {
			return nil, err
		}
		if err := p.await(ctx, "unix", socket); err != nil {
			p.stop()
			return nil, err
		}
		n, err := startContainerd(containerdOptions{Proxy: name, ProxySocket: socket})(ctx, o, dir, registry)
		if err != nil {
			p.stop()
			return nil, err
		}
		containerd, stop := n.processes, n.stop
		n.processes = func() ([]int, error) {
			pids, err := containerd()
			return append([]int{p.cmd.Process.Pid}, pids...), err
		}
		n.stop = func() error {
			err := stop()
			p.stop()
			return err
		}
		return n, nil
	}
}

const sociConfig = `[content_store]
  type = "containerd"
  containerd_address = {{json .Containerd}}
[pull_modes.soci_v1]
  enable = false
[pull_modes.soci_v2]
  enable = false
[pull_modes.parallel_pull_unpack]
  enable = true
  max_concurrent_downloads = -1
  max_concurrent_downloads_per_image = 10
  concurrent_download_chunk_size = "8mb"
  max_concurrent_unpacks = -1
  max_concurrent_unpacks_per_image = 4
  discard_unpacked_layers = true
{{- if .Decompressor}}
  [pull_modes.parallel_pull_unpack.decompress_streams."gzip"]
    path = {{json .Decompressor}}
    args = ["-d", "-c"]
{{- end}}
[resolver.host.{{json .Registry}}]
  [[resolver.host.{{json .Registry}}.mirrors]]
    host = {{.Registry | printf "http://%s" | json}}
    insecure = true
`

func startSOCI(o *Options, dir, socket, registry string) (*process, error) {
	config, root := filepath.Join(dir, "soci.toml"), filepath.Join(dir, "soci")
	tool := decompressor()
	if !filepath.IsAbs(tool) {
		tool = ""
	}
	err := render(config, sociConfig, map[string]string{
		"Containerd": filepath.Join(dir, "c.sock"), "Registry": registry, "Decompressor": tool,
	})
	if err != nil {
		return nil, err
	}
	return startProcess(dir, nil, o.peer("soci-snapshotter-grpc"), "--address", socket, "--root", root, "--config", config)
}

func startStargz(o *Options, dir, socket, _ string) (*process, error) {
	return startProcess(dir, nil, o.peer("stargz-snapshotter"), "-address", socket, "-root", filepath.Join(dir, "stargz"))
}
