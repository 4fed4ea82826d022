package cluster

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"text/template"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/bench/images"
)

// DefaultDir is where `make cluster` has its cluster.
const DefaultDir = "/tmp/hearth-cluster"

// DefaultNodes is how many nodes it has.
const DefaultNodes = 2

// ErrUp says that there is a cluster already.
var ErrUp = errors.New("is up already")

// Config of a cluster. Dir is required.
type Config struct {
	// Dir is the cluster's folder: state, logs, disks of its machines. Nothing else is in it.
	Dir string `json:"-"`
	// Nodes is how many nodes there are; 0 means DefaultNodes.
	Nodes int
	// Tools are the folders with the programs, in which they are looked for in turn; nil means the repository's (Tools).
	Tools []string
	// Progress, if not nil, is called with one line for people whenever something is ready.
	Progress func(line string) `json:"-"`
}

// Cluster is one that is up, or was.
type Cluster struct {
	config  Config
	id      string // names its cgroups and the host's link
	network network
	control machine
	nodes   []*Node
	began   time.Time
}

// state is what Open needs to know, as it is in the folder.
type state struct {
	Config  Config
	Network netip.Prefix
}

// Start makes a cluster in an empty folder, or one in which a cluster was that is down now, and returns when all its nodes are
// Ready and names are resolved. If that does not come about, it ends all that it has started; logs stay in the folder.
func Start(ctx context.Context, config Config) (*Cluster, error) {
	config, err := config.withDefaults()
	if err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, id(config.Dir))
	if err != nil {
		return nil, err
	}
	defer unlock()
	c := config.cluster(network{})
	if _, err := c.control.holder(); err == nil {
		return nil, fmt.Errorf("the cluster in %s %w: end it first, with `make cluster-down`", config.Dir, ErrUp)
	}
	if err := owned(config.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := removeAll(ctx, config.Dir, everything); err != nil {
		return nil, err
	}
	if err := takeFolder(config.Dir); err != nil {
		return nil, err
	}
	if err := c.start(ctx); err != nil {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), clearTime)
		defer cancel()
		return nil, errors.Join(err, removeAll(ending, config.Dir, exceptFiles))
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	if err := c.takeNetwork(ctx); err != nil {
		return err
	}
	if err := c.exportPause(ctx); err != nil {
		return err
	}
	if err := c.identities(); err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	c.progress("network %s", c.network.Prefix)
	if err := c.startControl(ctx); err != nil {
		return err
	}
	group, nodes := errgroup.WithContext(ctx)
	for _, n := range c.nodes {
		group.Go(func() error { return n.start(nodes) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := c.awaitDNS(ctx); err != nil {
		return err
	}
	c.progress("DNS on %s; the cluster is up", c.network.control())
	return nil
}

// takeFolder makes the cluster's folder, or takes one that is empty: what is in another's is not a cluster's to remove.
func takeFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s is not empty, and no cluster has been in it: choose another folder for the cluster", dir)
	}
	return nil
}

// owned says why a folder, which may be in one that anybody writes to, cannot be trusted to be a cluster's.
func owned(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || !ok || owner.Uid != 0 || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is no folder into which only root may write: choose another for the cluster", dir)
	}
	return nil
}

// takeNetwork chooses addresses and takes them by the host's link. In between no other cluster may choose.
func (c *Cluster) takeNetwork(ctx context.Context) error {
	unlock, err := lock(ctx, "network")
	if err != nil {
		return err
	}
	defer unlock()
	if c.network, err = freeNetwork(c.config.Dir); err != nil {
		return err
	}
	text, err := json.Marshal(state{c.config, c.network.Prefix})
	if err != nil {
		return err
	}
	if err := writeFile(stateFile(c.config.Dir), text); err != nil {
		return err
	}
	if err := c.control.boot(); err != nil {
		return err
	}
	if err := c.control.nameserver(c.network.control()); err != nil {
		return err
	}
	return c.cableControl()
}

// Open returns the cluster that Start has made in a folder, from this process or another.
func Open(dir string) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(stateFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no cluster in %s: `make cluster` starts one", dir)
	}
	if err != nil {
		return nil, err
	}
	var s state
	if err := json.Unmarshal(text, &s); err != nil {
		return nil, fmt.Errorf("read %s: %w", stateFile(dir), err)
	}
	s.Config.Dir = dir
	config, err := s.Config.withDefaults()
	if err != nil {
		return nil, err
	}
	return config.cluster(network{s.Network}), nil
}

func (c Config) withDefaults() (Config, error) {
	if c.Dir == "" {
		return c, errors.New("a cluster needs a folder: Config.Dir")
	}
	if os.Geteuid() != 0 {
		return c, errors.New("only root can run a cluster")
	}
	if c.Nodes == 0 {
		c.Nodes = DefaultNodes
	}
	if c.Nodes < 1 || c.Nodes > MaxNodes {
		return c, fmt.Errorf("a cluster has 1 to %d nodes, not %d", MaxNodes, c.Nodes)
	}
	var err error
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return c, err
	}
	if c.Tools == nil {
		if c.Tools, err = Tools(); err != nil {
			return c, err
		}
	}
	return c, nil
}

func (c Config) cluster(n network) *Cluster {
	out := &Cluster{config: c, id: id(c.Dir), network: n, began: time.Now()}
	out.control = out.machine("control", "control")
	for i := range c.Nodes {
		name := fmt.Sprintf("node-%d", i+1)
		out.nodes = append(out.nodes, &Node{cluster: out, machine: out.machine(name, "nodes/"+name), name: name, index: i})
	}
	return out
}

func (c *Cluster) machine(name, dir string) machine {
	return machine{name: name, dir: filepath.Join(c.config.Dir, dir), cgroup: filepath.Join(cgroup(c.config.Dir), name), tools: c.config.Tools}
}

// id tells clusters apart by their folders.
func id(dir string) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(dir))
	return fmt.Sprintf("%08x", h.Sum32())
}

func cgroup(dir string) string    { return "/hearth-cluster-" + id(dir) }
func stateFile(dir string) string { return filepath.Join(dir, "cluster.json") }

// Dir is the cluster's folder.
func (c *Cluster) Dir() string { return c.config.Dir }

// Kubeconfig is the file by which kubectl and others are the cluster's administrator.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.config.Dir, "kubeconfig") }

// Registry is the host and port of the cluster's registry: plain HTTP, no credentials, the same for the host and all nodes.
func (c *Cluster) Registry() string { return hostPort(c.network.control(), registryPort) }

// Nodes are all nodes, those that were killed as well.
func (c *Cluster) Nodes() []*Node { return c.nodes }

// Node is the one of that name, or nil.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.nodes {
		if n.name == name {
			return n
		}
	}
	return nil
}

// Tool is the path of one of the programs, such as kubectl.
func (c *Cluster) Tool(name string) string { return c.config.tool(name) }

// Down ends the cluster and removes all of it, its folder too.
func (c *Cluster) Down(ctx context.Context) error { return Down(ctx, c.config.Dir) }

func (c *Cluster) progress(format string, args ...any) {
	if c.config.Progress != nil {
		c.config.Progress(fmt.Sprintf("%5.1f s  ", time.Since(c.began).Seconds()) + fmt.Sprintf(format, args...))
	}
}

func (c *Cluster) pauseArchive() string { return filepath.Join(c.config.Dir, "pause.tar") }

func (c *Cluster) exportPause(ctx context.Context) error {
	cache, err := cacheFolder()
	if err != nil {
		return err
	}
	layout, err := images.Build(ctx, images.Config{Cache: cache}, "pause")
	if err != nil {
		return err
	}
	return images.ExportFile(layout, pauseRef, c.pauseArchive())
}

//go:embed config
var configs embed.FS

// values are what configurations are made with, beside those of the cluster.
type values struct {
	Name       string
	Address    netip.Addr
	Pods       netip.Prefix
	CgroupRoot string
}

// render writes one of the files of config to a machine.
func (c *Cluster) render(name, path string, v values) error {
	t, err := template.New(name).Option("missingkey=error").ParseFS(configs, "config/"+name)
	if err != nil {
		return fmt.Errorf("configuration %s: %w", name, err)
	}
	var text bytes.Buffer
	err = t.Execute(&text, struct {
		values
		Pause, Registry string
		Control         netip.Addr
		AllPods         netip.Prefix
	}{v, pauseRef, c.Registry(), c.network.control(), c.network.pods()})
	if err != nil {
		return fmt.Errorf("configuration %s: %w", name, err)
	}
	return writeFile(path, text.Bytes())
}
