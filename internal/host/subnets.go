package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Whole asks the kernel for a list again while it changes under the listing, as it does where other deployments come and go.
func Whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range 100 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return all, err
}

// Subnets are the networks that this machine has addresses in or routes to, except the default route.
func Subnets() ([]netip.Prefix, error) {
	addresses, err := Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	routes, err := Whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []netip.Prefix
	for _, a := range addresses {
		out = appendNet(out, a.IPNet)
	}
	for _, r := range routes {
		out = appendNet(out, r.Dst)
	}
	return out, nil
}

func appendNet(out []netip.Prefix, n *net.IPNet) []netip.Prefix {
	if n == nil {
		return out
	}
	ip, ok := netip.AddrFromSlice(n.IP.To4())
	ones, _ := n.Mask.Size()
	if !ok || ones == 0 {
		return out
	}
	return append(out, netip.PrefixFrom(ip, ones).Masked())
}
