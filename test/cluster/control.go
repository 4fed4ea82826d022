package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
)

// Names of programs that more than one place knows.
const (
	apiserver  = "kube-apiserver"
	containerd = "containerd"
	kubelet    = "kubelet"
	kubeProxy  = "kube-proxy"
)

const (
	apiPort      = 6443
	registryPort = 5000
	domain       = "cluster.local"
)

// identities issues what the programs show each other, and writes it where each machine's programs read it.
func (c *Cluster) identities() error {
	ca, err := newAuthority("hearth-test")
	if err != nil {
		return err
	}
	if err := c.controlIdentities(ca); err != nil {
		return err
	}
	for _, n := range c.nodes {
		if err := n.machine.prepareFolders(); err != nil {
			return err
		}
		dir := filepath.Join(n.machine.dir, "etc/kubernetes")
		if err := writeFile(filepath.Join(dir, "ca.crt"), ca.pem()); err != nil {
			return err
		}
		serving, err := ca.issue(pkix.Name{CommonName: n.name}, []string{n.name}, n.address())
		if err != nil {
			return err
		}
		if err := serving.write(dir, kubelet); err != nil {
			return err
		}
		if err := c.client(ca, dir, kubelet, pkix.Name{CommonName: "system:node:" + n.name, Organization: []string{"system:nodes"}}); err != nil {
			return err
		}
		if err := c.client(ca, dir, kubeProxy, pkix.Name{CommonName: "system:kube-proxy"}); err != nil {
			return err
		}
	}
	admin, err := c.kubeconfig(ca, pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}})
	if err != nil {
		return err
	}
	return writeFile(c.Kubeconfig(), admin)
}

func (c *Cluster) controlIdentities(ca *authority) error {
	dir := filepath.Join(c.control.dir, "etc/kubernetes")
	for _, program := range []string{"kube-controller-manager", "kube-scheduler", kubeProxy, "coredns"} {
		if err := c.client(ca, dir, program, pkix.Name{CommonName: "system:" + program}); err != nil {
			return err
		}
	}
	// Who asks through the API server in another's name is told by an authority of its own, or any client could.
	front, err := newAuthority("hearth-test-front")
	if err != nil {
		return err
	}
	serving, err := ca.issue(pkix.Name{CommonName: apiserver},
		[]string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + domain, "localhost"},
		c.network.control(), c.network.firstService(), netip.MustParseAddr("127.0.0.1"))
	toKubelet, err2 := ca.issue(pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}}, nil)
	toFront, err3 := front.issue(pkix.Name{CommonName: "front-proxy-client"}, nil)
	tokens, err4 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err := errors.Join(err, err2, err3, err4); err != nil {
		return err
	}
	tokenKey, err := encodeKey(tokens)
	public, err2 := encodePublic(tokens)
	return errors.Join(err, err2,
		writeFile(filepath.Join(dir, "ca.crt"), ca.pem()), writeFile(filepath.Join(dir, "front-ca.crt"), front.pem()),
		serving.write(dir, "serving"), toKubelet.write(dir, "to-kubelet"), toFront.write(dir, "front"),
		writeFile(filepath.Join(dir, "tokens.key"), tokenKey), writeFile(filepath.Join(dir, "tokens.pub"), public))
}

// client writes a kubeconfig PROGRAM.conf.
func (c *Cluster) client(ca *authority, dir, program string, subject pkix.Name) error {
	text, err := c.kubeconfig(ca, subject)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, program+".conf"), text)
}

func (c *Cluster) kubeconfig(ca *authority, subject pkix.Name) ([]byte, error) {
	pair, err := ca.issue(subject, nil)
	if err != nil {
		return nil, err
	}
	return kubeconfig(hostPort(c.network.control(), apiPort), ca.pem(), subject.CommonName, pair)
}

// controlPrograms are the control plane's, by name.
func (c *Cluster) controlPrograms() map[string]program {
	address := c.network.control().String()
	programs := map[string][]string{
		"registry": {"registry", "serve", "/etc/kubernetes/registry.yaml"},
		"etcd": {
			"etcd", "--data-dir=/var/lib/etcd", "--unsafe-no-fsync", "--log-level=warn", "--quota-backend-bytes=2147483648",
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380",
		},
		apiserver: {
			apiserver, "--etcd-servers=http://127.0.0.1:2379", "--advertise-address=" + address, fmt.Sprintf("--secure-port=%d", apiPort),
			"--service-cluster-ip-range=" + c.network.services().String(), "--allow-privileged=true",
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--client-ca-file=/etc/kubernetes/ca.crt", "--tls-cert-file=/etc/kubernetes/serving.crt", "--tls-private-key-file=/etc/kubernetes/serving.key",
			"--kubelet-certificate-authority=/etc/kubernetes/ca.crt", "--kubelet-preferred-address-types=InternalIP",
			"--kubelet-client-certificate=/etc/kubernetes/to-kubelet.crt", "--kubelet-client-key=/etc/kubernetes/to-kubelet.key",
			"--service-account-issuer=https://kubernetes.default.svc." + domain,
			"--service-account-key-file=/etc/kubernetes/tokens.pub", "--service-account-signing-key-file=/etc/kubernetes/tokens.key",
			"--requestheader-client-ca-file=/etc/kubernetes/front-ca.crt", "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=/etc/kubernetes/front.crt", "--proxy-client-key-file=/etc/kubernetes/front.key",
			"--profiling=false",
		},
		"kube-controller-manager": {
			"kube-controller-manager", "--kubeconfig=/etc/kubernetes/kube-controller-manager.conf", "--leader-elect=false",
			"--use-service-account-credentials", "--service-account-private-key-file=/etc/kubernetes/tokens.key", "--root-ca-file=/etc/kubernetes/ca.crt",
			"--authentication-kubeconfig=/etc/kubernetes/kube-controller-manager.conf", "--authorization-kubeconfig=/etc/kubernetes/kube-controller-manager.conf",
			"--kube-api-qps=100", "--kube-api-burst=200", "--profiling=false",
		},
		"kube-scheduler": {
			"kube-scheduler", "--kubeconfig=/etc/kubernetes/kube-scheduler.conf", "--leader-elect=false",
			"--authentication-kubeconfig=/etc/kubernetes/kube-scheduler.conf", "--authorization-kubeconfig=/etc/kubernetes/kube-scheduler.conf",
			"--kube-api-qps=200", "--kube-api-burst=400", "--profiling=false",
		},
		"coredns": {"coredns", "-conf", "/etc/kubernetes/Corefile"},
		// So that the host, and webhooks that the API server calls, reach Services whichever node lives.
		kubeProxy: {kubeProxy, "--config=/etc/kubernetes/kube-proxy.yaml"},
	}
	out := map[string]program{}
	for name, args := range programs {
		args[0] = c.config.tool(args[0])
		out[name] = program{name: name, args: args}
	}
	return out
}

// startControl brings the control plane up as far as its API server, and starts the rest of it.
func (c *Cluster) startControl(ctx context.Context) error {
	for name, file := range map[string]string{
		"registry.yaml": "etc/kubernetes/registry.yaml", "Corefile": "etc/kubernetes/Corefile", "kube-proxy.yaml": "etc/kubernetes/kube-proxy.yaml",
	} {
		if err := c.render(name, filepath.Join(c.control.dir, file), values{Name: c.control.name, Address: c.network.control()}); err != nil {
			return err
		}
	}
	programs := c.controlPrograms()
	for _, name := range []string{"registry", "etcd", apiserver} {
		if err := c.control.run(programs[name]); err != nil {
			return err
		}
	}
	if err := c.await(ctx, c.control, "registry", func(ctx context.Context) error { return get(ctx, http.DefaultClient, "http://"+c.Registry()+"/v2/") }); err != nil {
		return err
	}
	c.progress("registry on %s", c.Registry())
	if err := c.awaitAPI(ctx); err != nil {
		return err
	}
	c.progress("API server on https://%s", hostPort(c.network.control(), apiPort))
	if err := c.apply(ctx, "coredns-role.yaml"); err != nil {
		return err
	}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "coredns", kubeProxy} {
		if err := c.control.run(programs[name]); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) awaitAPI(ctx context.Context) error {
	return c.await(ctx, c.control, apiserver, func(ctx context.Context) error { return c.ask(ctx, "/readyz", nil) })
}

func (c *Cluster) awaitDNS(ctx context.Context) error {
	return c.await(ctx, c.control, "coredns", func(ctx context.Context) error {
		return get(ctx, http.DefaultClient, "http://"+hostPort(c.network.control(), 8181)+"/ready")
	})
}

// apply hands one of our manifests to kubectl.
func (c *Cluster) apply(ctx context.Context, name string) error {
	text, err := configs.ReadFile("config/" + name)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, c.config.tool("kubectl"), "--kubeconfig", c.Kubeconfig(), "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(string(text))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apply %s: %w\n%s", name, err, out)
	}
	return nil
}

// StopAPIServer ends the API server at once, as a crash would. The rest of the control plane goes on without it.
func (c *Cluster) StopAPIServer(ctx context.Context) error { return c.control.stop(ctx, apiserver) }

// StartAPIServer starts it again and waits until it serves.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	if len(c.control.processes(apiserver)) > 0 {
		return errors.New("the API server has not been stopped")
	}
	if err := c.control.run(c.controlPrograms()[apiserver]); err != nil {
		return err
	}
	return c.awaitAPI(ctx)
}
