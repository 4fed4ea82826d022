package stack

import (
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"time"
)

// Names of the children, also of their logs and admin sockets.
const (
	nameContainerd  = "containerd"
	nameRegistry    = "registry"
	nameNodeagent   = "nodeagent"
	namePoolmanager = "poolmanager"
	nameGateway     = "gateway"
)

// sidecarProgram is found beside nodeagent.
const sidecarProgram = "sidecar"

// spec is a child: how to start it, how long its end may take, and how one knows that it is ready.
type spec struct {
	name  string
	cmd   command
	grace time.Duration
	ready probe
	admin string // socket of its admin listener; empty if it has none
}

func (c Config) specs(environ []string) map[string]spec {
	p, env := c.paths(), c.childEnv(environ)
	tool := func(name string, grace time.Duration, ready probe, args ...string) spec {
		return spec{name: name, grace: grace, ready: ready, cmd: command{filepath.Join(c.Tools, name), args, env, p.log(name)}}
	}
	own := func(name string, grace time.Duration, args ...string) spec {
		args = append(args, "--log-level", c.LogLevel, "--admin-address", "unix:"+p.admin(name))
		return spec{
			name: name, grace: grace, ready: probeReadyz(p.admin(name)), admin: p.admin(name),
			cmd: command{filepath.Join(c.Bin, name), args, env, p.log(name)},
		}
	}
	gateway := own(nameGateway, 35*time.Second,
		"--name", c.nodeName(),
		"--address", c.GatewayAddress,
		"--pool-socket", p.poolSocket())
	gateway.cmd.env = append(slices.Clone(env), gatewayCores(runtime.NumCPU()))
	return map[string]spec{
		nameGateway:    gateway,
		nameContainerd: tool(nameContainerd, 10*time.Second, probeDial("unix", p.containerdSocket()), "--config", p.containerdConfig()),
		nameRegistry:   tool(nameRegistry, 5*time.Second, probeDial("tcp", c.RegistryAddress), "serve", p.registryConfig()),
		nameNodeagent: own(nameNodeagent, 15*time.Second, append([]string{
			"--name", c.nodeName(),
			"--root", p.nodeRoot(),
			"--socket", p.nodeSocket(),
			"--containerd-socket", p.containerdSocket(),
			"--snapshotter-root", p.snapshotterRoot(),
			"--snapshotter-socket", p.snapshotterSocket(), "--image-service-socket", p.imageSocket(),
			"--cgroup-parent", CgroupParent(c.Name),
			"--network-dir", p.networkDir(),
			"--hosts-dir", c.HostsDir,
			"--share-profiles", c.shareProfiles(),
			"--sidecar", c.sidecar(),
		}, c.NodeFlags...)...),
		namePoolmanager: own(namePoolmanager, 10*time.Second,
			"--store", p.store(),
			"--rpc-socket", p.poolSocket(),
			"--node-socket", c.nodeName()+"="+p.nodeSocket(),
			"--pool-size", strconv.Itoa(c.PoolSize)),
	}
}

// gatewayCores leaves half of the machine's cores to the Functions that the gateway calls. On two cores that is one for the
// gateway, whose goroutines then hand a request on without waking another core.
func gatewayCores(cores int) string {
	return "GOMAXPROCS=" + strconv.Itoa(max(1, cores/2))
}

// sidecar is what nodeagent is told. It is always told, for it would read the environment variable of our own flag.
func (c Config) sidecar() string {
	if c.Sidecar {
		return sidecarProgram
	}
	return "none"
}

// shareProfiles names the deployment's own registry, where everything is its own: nobody else's is written to unasked.
func (c Config) shareProfiles() string {
	if c.Registry {
		return c.RegistryAddress
	}
	return "none"
}

// nodeName is the only node's; the same after every start, so that what containerd remembers is found again.
func (c Config) nodeName() string { return c.Name }
