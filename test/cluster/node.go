package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/hearth-serverless/hearth/internal/host"
)

// pauseRef is the image of the process that holds a pod's namespaces; nodes are given it, and never ask a registry.
const pauseRef = "hearth.local/pause:1"

// Node is one of the cluster's nodes.
type Node struct {
	cluster *Cluster
	machine machine
	name    string
	index   int
}

// Name is the Node's name in Kubernetes.
func (n *Node) Name() string { return n.name }

// Zone is its label topology.kubernetes.io/zone: nodes are in a and b by turns.
func (n *Node) Zone() string { return []string{"a", "b"}[n.index%2] }

// Dir is the folder on the host with the node's /etc, /opt, /run and /var.
func (n *Node) Dir() string { return n.machine.dir }

// Address is where the host, other nodes and pods reach it.
func (n *Node) Address() string { return n.address().String() }

func (n *Node) address() netip.Addr { return n.cluster.network.node(n.index) }

// Command is a command that runs on the node: its network, mounts and host name, with its programs on the PATH. Of the Cmd,
// Dir has to be left alone.
func (n *Node) Command(ctx context.Context, name string, args ...string) (*exec.Cmd, error) {
	words, err := n.machine.nsenter()
	if err != nil {
		return nil, err
	}
	words = append(append(words, name), args...)
	return exec.CommandContext(ctx, words[0], words[1:]...), nil
}

// Kill ends the node as a power failure would: its link is gone at once, then its kubelet, its containerd and all that runs in its
// pods. What it had on disk stays.
func (n *Node) Kill(ctx context.Context) error {
	if err := n.cluster.unplug(n); err != nil {
		return fmt.Errorf("kill %s: %w", n.name, err)
	}
	if err := host.RemoveCgroup(ctx, n.machine.cgroup); err != nil {
		return fmt.Errorf("kill %s: %w", n.name, err)
	}
	return nil
}

// Restart brings a node up that was killed, with the disk it had, and waits until it is Ready.
func (n *Node) Restart(ctx context.Context) error {
	if _, err := n.machine.holder(); err == nil {
		return fmt.Errorf("node %s is up: kill it first", n.name)
	}
	return n.start(ctx)
}

// start boots the node and waits until Kubernetes calls it Ready.
func (n *Node) start(ctx context.Context) error {
	since := time.Now().Truncate(time.Second) // as exact as Kubernetes tells the time
	if err := n.machine.boot(); err != nil {
		return err
	}
	if err := n.cluster.cableNode(n); err != nil {
		return fmt.Errorf("node %s: %w", n.name, err)
	}
	if err := n.configure(); err != nil {
		return fmt.Errorf("node %s: %w", n.name, err)
	}
	programs := n.programs()
	if err := n.machine.run(programs[containerd]); err != nil {
		return fmt.Errorf("node %s: %w", n.name, err)
	}
	if err := n.awaitContainerd(ctx); err != nil {
		return err
	}
	if err := n.importPause(ctx); err != nil {
		return fmt.Errorf("node %s: %w", n.name, err)
	}
	for _, name := range []string{kubelet, kubeProxy} {
		if err := n.machine.run(programs[name]); err != nil {
			return fmt.Errorf("node %s: %w", n.name, err)
		}
	}
	err := n.cluster.await(ctx, n.machine, kubelet, func(ctx context.Context) error { return n.ready(ctx, since) })
	if err != nil {
		return err
	}
	n.cluster.progress("node %s on %s is Ready, zone %s", n.name, n.Address(), n.Zone())
	return nil
}

// configure writes what the programs read. containerd's own file is written once: what is installed on the node may change it.
func (n *Node) configure() error {
	v := values{Name: n.name, Address: n.address(), Pods: n.cluster.network.podsOf(n.index), CgroupRoot: n.machine.cgroup}
	for _, f := range []struct{ name, path string }{
		{"kubelet.yaml", "etc/kubernetes/kubelet.yaml"},
		{"kube-proxy.yaml", "etc/kubernetes/kube-proxy.yaml"},
		{"cni.conflist", "etc/cni/net.d/10-pods.conflist"},
		{"hosts.toml", "etc/containerd/certs.d/" + n.cluster.Registry() + "/hosts.toml"},
		{"containerd.toml", "etc/containerd/config.toml"},
	} {
		path := filepath.Join(n.machine.dir, f.path)
		if _, err := os.Stat(path); err == nil && f.name == "containerd.toml" {
			continue
		}
		if err := n.cluster.render(f.name, path, v); err != nil {
			return err
		}
	}
	return errors.Join(
		os.MkdirAll(filepath.Join(n.machine.dir, "etc/containerd/conf.d"), 0o755),
		n.machine.nameserver(n.cluster.network.control()))
}

func (n *Node) programs() map[string]program {
	c := n.cluster.config
	return map[string]program{
		containerd: {name: containerd, args: []string{c.tool(containerd), "--config", "/etc/containerd/config.toml"}},
		kubelet: {name: kubelet, args: []string{
			c.tool(kubelet), "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.conf",
			"--hostname-override=" + n.name, "--node-ip=" + n.Address(), "--node-labels=topology.kubernetes.io/zone=" + n.Zone(),
		}},
		kubeProxy: {name: kubeProxy, args: []string{c.tool(kubeProxy), "--config=/etc/kubernetes/kube-proxy.yaml"}},
	}
}

func (n *Node) awaitContainerd(ctx context.Context) error {
	return n.cluster.await(ctx, n.machine, containerd, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.machine.dir, "run/containerd/containerd.sock"))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

func (n *Node) importPause(ctx context.Context) error {
	archive, err := os.ReadFile(n.cluster.pauseArchive())
	if err != nil {
		return fmt.Errorf("pause image: %w", err)
	}
	cmd, err := n.Command(ctx, "ctr", "--namespace", "k8s.io", "images", "import", "-")
	if err != nil {
		return err
	}
	cmd.Stdin = bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("import the pause image: %w\n%s", err, out)
	}
	return nil
}

// ready asks Kubernetes whether it has heard from the node since then that it is Ready.
func (n *Node) ready(ctx context.Context, since time.Time) error {
	var node struct {
		Status struct {
			Conditions []struct {
				Type, Status, Message string
				LastHeartbeatTime     time.Time
			}
		}
	}
	if err := n.cluster.ask(ctx, "/api/v1/nodes/"+n.name, &node); err != nil {
		return err
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == "Ready" {
			if condition.Status == "True" && !condition.LastHeartbeatTime.Before(since) {
				return nil
			}
			return fmt.Errorf("it is not Ready: %s", condition.Message)
		}
	}
	return errors.New("it has told nothing of itself yet")
}

// nameserver makes a machine ask it, and nobody else, for names.
func (m machine) nameserver(a netip.Addr) error {
	path := filepath.Join(m.dir, "etc/resolv.conf")
	_ = os.Remove(path) // it may be a link
	return os.WriteFile(path, fmt.Appendf(nil, "nameserver %s\n", a), 0o644)
}
