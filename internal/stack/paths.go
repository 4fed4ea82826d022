package stack

import (
	"path/filepath"
	"strings"
)

// Sockets of a deployment, in its Run folder. Connect clients use daemon.UnixClient.
const (
	NodeSocket = "node.sock" // NodeService
	PoolSocket = "pool.sock" // AllocationService, FunctionService, LoadService
	// ImageSocket is the CRI's ImageService as a kubelet would use it: containerd's, with Hearth before it.
	ImageSocket = "image.sock"
	// ContainerdSocket is containerd's own API and the CRI.
	ContainerdSocket = "containerd.sock"
)

// paths are the places of a deployment.
type paths struct{ root, run string }

func (c Config) paths() paths { return paths{c.Root, c.Run} }

func (p paths) containerdSocket() string  { return filepath.Join(p.run, ContainerdSocket) }
func (p paths) snapshotterSocket() string { return filepath.Join(p.run, "snapshotter.sock") }
func (p paths) imageSocket() string       { return filepath.Join(p.run, ImageSocket) }
func (p paths) nodeSocket() string        { return filepath.Join(p.run, NodeSocket) }
func (p paths) poolSocket() string        { return filepath.Join(p.run, PoolSocket) }
func (p paths) shimSockets() string       { return filepath.Join(p.run, "s") }
func (p paths) containerdState() string   { return filepath.Join(p.run, "containerd") }
func (p paths) networkDir() string {
	return filepath.Join(p.containerdState(), "io.containerd.grpc.v1.cri", "netns")
}                                        // netns_mounts_under_state_dir
func (p paths) containerdRoot() string   { return filepath.Join(p.root, "containerd") }
func (p paths) snapshotterRoot() string  { return filepath.Join(p.root, "snapshotter") }
func (p paths) nodeRoot() string         { return filepath.Join(p.root, "node") }
func (p paths) store() string            { return filepath.Join(p.root, "poolmanager.db") }
func (p paths) registryRoot() string     { return filepath.Join(p.root, "registry") }
func (p paths) logDir() string           { return filepath.Join(p.root, "log") }
func (p paths) log(name string) string   { return filepath.Join(p.logDir(), name+".log") }
func (p paths) subnetFile() string       { return filepath.Join(p.root, "subnet") }
func (p paths) configDir() string        { return filepath.Join(p.run, "config") }
func (p paths) containerdConfig() string { return filepath.Join(p.configDir(), "containerd.toml") }
func (p paths) registryConfig() string   { return filepath.Join(p.configDir(), "registry.yaml") }
func (p paths) cniDir() string           { return filepath.Join(p.configDir(), "cni") }
func (p paths) leases() string           { return filepath.Join(p.run, "ipam") }
func (p paths) lock() string             { return filepath.Join(p.run, "hearth.lock") }
func (p paths) rootLock() string         { return filepath.Join(p.root, "hearth.lock") }
func (p paths) pid() string              { return filepath.Join(p.run, "hearth.pid") }
func (p paths) status() string           { return filepath.Join(p.run, "status.json") }
func (p paths) admin(name string) string { return filepath.Join(p.run, "admin-"+name+".sock") }

// CgroupParent is the cgroup, as a path from the top of each hierarchy, below which the Instances of a deployment are.
func CgroupParent(name string) string { return "/hearth-" + name }

// shimSocketNameBytes is how long the names are that containerd gives to its shims' sockets: a hash.
const shimSocketNameBytes = 64

// sockets are all paths that must be short enough for a Unix socket.
func (p paths) sockets() []string {
	return []string{
		filepath.Join(p.shimSockets(), strings.Repeat("x", shimSocketNameBytes)),
		p.containerdSocket() + ".ttrpc", p.snapshotterSocket(), p.nodeSocket(), p.poolSocket(), p.admin("poolmanager"),
	}
}

// ContainerdConfig is the configuration of a deployment's private containerd.
func ContainerdConfig(run string) string { return paths{run: run}.containerdConfig() }

// LogDir is where each daemon of a deployment logs, a file each.
func LogDir(root string) string { return paths{root: root}.logDir() }

// within says whether path is dir or lies in it.
func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }
