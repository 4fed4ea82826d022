package cluster

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

// MaxNodes is how many nodes a cluster's addresses suffice for.
const MaxNodes = 100

// network is a cluster's addresses: a /16 of 10.0.0.0/8, in which machines, Services and the pods of each node have their places.
type network struct{ Prefix netip.Prefix }

func (n network) at(third, fourth int) netip.Addr {
	b := n.Prefix.Addr().As4()
	return netip.AddrFrom4([4]byte{b[0], b[1], byte(third), byte(fourth)})
}

func (n network) control() netip.Addr      { return n.at(0, 1) }
func (n network) host() netip.Addr         { return n.at(0, 2) }
func (n network) node(i int) netip.Addr    { return n.at(0, 11+i) }
func (n network) machines() netip.Prefix   { return netip.PrefixFrom(n.at(0, 0), 20) }
func (n network) services() netip.Prefix   { return netip.PrefixFrom(n.at(16, 0), 20) }
func (n network) firstService() netip.Addr { return n.at(16, 1) }
func (n network) pods() netip.Prefix       { return netip.PrefixFrom(n.at(128, 0), 17) }
func (n network) podsOf(i int) netip.Prefix {
	return netip.PrefixFrom(n.at(128+i, 0), 24)
}

// chooseNetwork takes one that the host uses no part of. Where the search begins depends on the cluster's folder.
func chooseNetwork(dir string, taken []netip.Prefix) (network, error) {
	const first, count = 64, 64
	h := fnv.New32a()
	_, _ = h.Write([]byte(dir))
next:
	for i := range uint32(count) {
		n := network{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(first + (h.Sum32()+i)%count)}), 16)}
		for _, t := range taken {
			if n.Prefix.Overlaps(t) {
				continue next
			}
		}
		return n, nil
	}
	return network{}, fmt.Errorf("no network is free for a cluster: this machine has addresses or routes in all of 10.%d.0.0 to 10.%d.255.255", first, first+count-1)
}

// bridge joins all machines, in the control plane's network namespace.
const bridge = "machines"

// cableControl makes the bridge and the host's link to it, and tells the host where Services are.
func (c *Cluster) cableControl() error {
	err := c.control.enter(func() error {
		if err := settings(map[string]string{"ipv4/ip_forward": "1", "bridge/bridge-nf-call-iptables": "0"}); err != nil {
			return err
		}
		if err := up("lo"); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridge
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("make bridge: %w", err)
		}
		return address(bridge, netip.PrefixFrom(c.network.control(), c.network.machines().Bits()))
	})
	if err != nil {
		return err
	}
	pid, err := c.control.holder()
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = c.hostLink()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "host", PeerNamespace: netlink.NsPid(pid)}); err != nil {
		return fmt.Errorf("link the host to the cluster: %w", err)
	}
	if err := address(c.hostLink(), netip.PrefixFrom(c.network.host(), c.network.machines().Bits())); err != nil {
		return err
	}
	if err := c.control.enter(func() error { return plug("host") }); err != nil {
		return err
	}
	return route(c.network.services(), c.network.control())
}

// cableNode links a node to the bridge and tells it, the control plane and the host where pods are.
func (c *Cluster) cableNode(n *Node) error {
	pid, err := n.machine.holder()
	if err != nil {
		return err
	}
	pods := c.network.podsOf(n.index)
	err = c.control.enter(func() error {
		if old, err := netlink.LinkByName(n.name); err == nil { // of a node that was killed just now
			_ = netlink.LinkDel(old)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = n.name
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsPid(pid)}); err != nil {
			return fmt.Errorf("link %s: %w", n.name, err)
		}
		if err := plug(n.name); err != nil {
			return err
		}
		return route(pods, n.address())
	})
	if err != nil {
		return err
	}
	if err := route(pods, n.address()); err != nil {
		return err
	}
	return n.machine.enter(func() error {
		if err := settings(map[string]string{"ipv4/ip_forward": "1", "bridge/bridge-nf-call-iptables": "1"}); err != nil {
			return err
		}
		if err := up("lo"); err != nil {
			return err
		}
		if err := address("eth0", netip.PrefixFrom(n.address(), c.network.machines().Bits())); err != nil {
			return err
		}
		for _, other := range c.nodes {
			if other != n {
				if err := route(c.network.podsOf(other.index), other.address()); err != nil {
					return err
				}
			}
		}
		return route(netip.PrefixFrom(netip.IPv4Unspecified(), 0), c.network.control())
	})
}

// unplug takes the node off the network at once.
func (c *Cluster) unplug(n *Node) error {
	return c.control.enter(func() error {
		link, err := netlink.LinkByName(n.name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
}

// The following act in the network namespace of the calling thread.

func settings(values map[string]string) error {
	for name, value := range values {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0o600); err != nil {
			return fmt.Errorf("set net/%s: %w", name, err)
		}
	}
	return nil
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("bring up link %s: %w", name, err)
	}
	return nil
}

func address(name string, prefix netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(prefix)})
	}
	if err != nil {
		return fmt.Errorf("give link %s the address %s: %w", name, prefix, err)
	}
	return up(name)
}

func plug(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("plug link %s: %w", name, err)
	}
	to, err := netlink.LinkByName(bridge)
	if err == nil {
		err = netlink.LinkSetMaster(link, to)
	}
	if err != nil {
		return fmt.Errorf("plug link %s: %w", name, err)
	}
	return up(name)
}

func route(to netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("route %s by %s: %w", to, via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// hostLink is the host's end; its routes go with it.
func (c *Cluster) hostLink() string { return "hc-" + c.id }

func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) { // the kernel removes it by itself, with the other end's namespace
		return fmt.Errorf("remove link %s: %w", name, err)
	}
	return nil
}

// freeNetwork chooses among what the host does not use.
func freeNetwork(dir string) (network, error) {
	taken, err := host.Subnets()
	if err != nil {
		return network{}, err
	}
	return chooseNetwork(dir, taken)
}

// hostPort joins an address and a port.
func hostPort(a netip.Addr, port int) string { return net.JoinHostPort(a.String(), strconv.Itoa(port)) }
