package stack

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/hearth-serverless/hearth/internal/host"
)

// linksIn lists the virtual Ethernet links of this namespace with an address in the subnet: the host's ends of Instances.
func linksIn(subnet netip.Prefix) ([]netlink.Link, error) {
	if !subnet.IsValid() {
		return nil, nil
	}
	links, err := host.Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var out []netlink.Link
	for _, link := range links {
		if link.Type() != "veth" {
			continue
		}
		addresses, err := host.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V4) })
		if err != nil {
			continue // it is gone meanwhile
		}
		for _, a := range addresses {
			if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok && subnet.Contains(ip) {
				out = append(out, link)
				break
			}
		}
	}
	return out, nil
}

// removeLinks deletes them. The kernel deletes those of a namespace that ended by itself, a moment later; both are fine.
func removeLinks(ctx context.Context, subnet netip.Prefix) error {
	for {
		links, err := linksIn(subnet)
		if err != nil || len(links) == 0 {
			return err
		}
		for _, link := range links {
			_ = netlink.LinkDel(link)
		}
		if !host.Pause(ctx, 10*time.Millisecond) {
			return fmt.Errorf("network link %s of subnet %s does not go away", links[0].Attrs().Name, subnet)
		}
	}
}
