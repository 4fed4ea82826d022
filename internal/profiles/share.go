package profiles

import (
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/spf13/pflag"
)

// Share says to which registries a node pushes profiles. A node is not asked before it writes, and its pull secrets may well be good
// for more than pulling: so none is written to that nobody has named. The zero value names none.
type Share struct {
	all   bool
	hosts []string
}

// Flags defines the flag.
func (s *Share) Flags(f *pflag.FlagSet) {
	f.Var(s, "share-profiles", "registries that profiles of images are pushed to, beside their images, once three starts here have made them, for other nodes to use: HOST[:PORT],…, all, or none. It wants the right to push; looking for profiles wants no more than pulling")
	f.Lookup("share-profiles").DefValue = "none"
}

// String, Set and Type make it a flag's value.
func (s *Share) String() string {
	switch {
	case s.all:
		return "all"
	case len(s.hosts) == 0:
		return "none"
	}
	return strings.Join(s.hosts, ",")
}

// Type is shown in help.
func (*Share) Type() string { return "registries" }

// Set takes all, none, or hosts. The values of a switch mean what one expects.
func (s *Share) Set(text string) error {
	switch text {
	case "all", "true":
		*s = Share{all: true}
		return nil
	case "none", "false", "":
		*s = Share{}
		return nil
	}
	var hosts []string
	for host := range strings.SplitSeq(text, ",") {
		named, err := reference.ParseNormalizedNamed(host + "/x/y")
		if err != nil || reference.Domain(named) != host {
			return fmt.Errorf("%q is no registry: use HOST[:PORT], as references of images begin, all, or none", host)
		}
		hosts = append(hosts, host)
	}
	*s = Share{hosts: hosts}
	return nil
}

// with says whether profiles go to a registry.
func (s Share) with(host string) bool {
	return s.all || slices.Contains(s.hosts, host)
}
