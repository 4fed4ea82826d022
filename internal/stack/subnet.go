package stack

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"os"
	"strings"
)

const (
	subnetBits   = 20                        // 4096 addresses
	subnetChoice = 16 * (1 << (20 - 16)) * 3 // how many subnets of that size are tried: 10.208.0.0 to 10.255.240.0
)

// chooseSubnet takes the given one, or the one used before, or else a free one; taken is what the machine uses already.
// Where the search begins depends on the deployment's name, so that two that start at once hardly choose the same.
func chooseSubnet(want, before netip.Prefix, name string, taken []netip.Prefix) (netip.Prefix, error) {
	if want.IsValid() {
		if other, ok := overlap(want, taken); ok {
			return want, fmt.Errorf("subnet %s: this machine uses %s already; choose another with --subnet", want, other)
		}
		return want, nil
	}
	if before.IsValid() {
		if _, ok := overlap(before, taken); !ok {
			return before, nil
		}
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	start := h.Sum32() % subnetChoice
	for i := range uint32(subnetChoice) {
		n := (start + i) % subnetChoice
		candidate := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(208 + n/16), byte(n % 16 * 16), 0}), subnetBits)
		if _, ok := overlap(candidate, taken); !ok {
			return candidate, nil
		}
	}
	return netip.Prefix{}, errors.New("subnet: none of 10.208.0.0 to 10.255.240.0 is free; choose one with --subnet")
}

func overlap(p netip.Prefix, taken []netip.Prefix) (netip.Prefix, bool) {
	for _, t := range taken {
		if p.Overlaps(t) {
			return t, true
		}
	}
	return netip.Prefix{}, false
}

// lastSubnet is what the deployment used before; the zero Prefix when nothing is known.
func (p paths) lastSubnet() netip.Prefix {
	data, err := os.ReadFile(p.subnetFile())
	if err != nil {
		return netip.Prefix{}
	}
	prefix, err := netip.ParsePrefix(strings.TrimSpace(string(data)))
	if err != nil || !prefix.Addr().Is4() {
		return netip.Prefix{}
	}
	return prefix.Masked()
}
