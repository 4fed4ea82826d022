package cluster

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/http"
	"net/netip"
	"path/filepath"

	"github.com/hearth-serverless/hearth/internal/host"
)

// ChosenNetwork is what chooseNetwork chooses, in parts.
func ChosenNetwork(dir string, taken []netip.Prefix) (whole netip.Prefix, parts []netip.Prefix, err error) {
	n, err := chooseNetwork(dir, taken)
	if err != nil {
		return netip.Prefix{}, nil, err
	}
	parts = []netip.Prefix{n.machines(), n.services()}
	for i := range MaxNodes {
		parts = append(parts, n.podsOf(i))
	}
	return n.Prefix, parts, nil
}

// LastMachine is the address of the last node that there may be.
func LastMachine() (address netip.Addr, machines, pods netip.Prefix) {
	n := network{netip.MustParsePrefix("10.64.0.0/16")}
	return n.node(MaxNodes - 1), n.machines(), n.pods()
}

// Rendered is what render makes of a file of config for a node.
func Rendered(dir, name string) (path string, err error) {
	c := Config{Dir: dir, Nodes: 1}.cluster(network{netip.MustParsePrefix("10.64.0.0/16")})
	path = filepath.Join(dir, name)
	return path, c.render(name, path, values{Name: "node-1", Address: c.nodes[0].address(), Pods: c.network.podsOf(0), CgroupRoot: c.nodes[0].machine.cgroup})
}

// Configs are the names of all files of config.
func Configs() []string {
	var out []string
	entries, _ := configs.ReadDir("config")
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// Issue makes an authority with a server's and a client's certificate, and a kubeconfig for the client.
func Issue(address string) (serving keyPair, ca *x509.CertPool, config []byte, err error) {
	a, err := newAuthority("test")
	if err != nil {
		return keyPair{}, nil, nil, err
	}
	if serving, err = a.issue(pkix.Name{CommonName: "server"}, []string{"server"}, netip.MustParseAddr("127.0.0.1")); err != nil {
		return keyPair{}, nil, nil, err
	}
	client, err := a.issue(pkix.Name{CommonName: "client", Organization: []string{"group"}}, nil)
	if err != nil {
		return keyPair{}, nil, nil, err
	}
	ca = x509.NewCertPool()
	ca.AppendCertsFromPEM(a.pem())
	config, err = kubeconfig(address, a.pem(), "client", client)
	return serving, ca, config, err
}

// PEM is the certificate and its key.
func (p keyPair) PEM() (cert, key []byte) { return p.cert, p.key }

// Administrator is administrator.
func Administrator(path string) (*http.Client, string, error) { return administrator(path) }

// Machine is a machine by itself.
type Machine struct{ machine }

// NewMachine is one whose folders and cgroups are those of a cluster's folder.
func NewMachine(dir string) Machine { return Machine{Config{Dir: dir}.cluster(network{}).control} }

// Boot is boot, Run starts a program, Enter is enter.
func (m Machine) Boot() error { return m.boot() }
func (m Machine) Run(name string, args ...string) error {
	return m.run(program{name: name, args: args})
}
func (m Machine) Enter(f func() error) error                   { return m.enter(f) }
func (m Machine) Log(name string) string                       { return m.log(name) }
func (m Machine) Restarts(name string) int                     { return m.restarts(name) }
func (m Machine) Processes(name string) []int                  { return m.processes(name) }
func (m Machine) Stop(ctx context.Context, name string) error  { return m.stop(ctx, name) }
func (m Machine) Await(ctx context.Context, name string) error { return awaitNothing(ctx, m, name) }
func (m Machine) Kill(ctx context.Context) error               { return host.RemoveCgroup(ctx, m.cgroup) }

// awaitNothing waits for a program of the machine that never becomes ready.
func awaitNothing(ctx context.Context, m Machine, name string) error {
	c := &Cluster{}
	return c.await(ctx, m.machine, name, func(context.Context) error { return errNever })
}

type never struct{}

func (never) Error() string { return "never ready" }

var errNever = never{}
