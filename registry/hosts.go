package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	distref "github.com/distribution/reference"
)

// maxRepositories bounds the tokens remembered per registry; beyond it all are
// forgotten and fetched anew.
const maxRepositories = 1024

// hostSet is what hosts.toml (or the default) says about one registry name:
// the mirrors in order, the registry itself last.
type hostSet struct {
	stamp      string // of hosts.toml when it was read
	hosts      []*endpoint
	transports []*http.Transport // of hosts

	mu    sync.Mutex             // guards repos
	repos map[string]*repository // by locator
}

// endpoint is one host that may serve the repositories of a registry.
type endpoint struct {
	docker.RegistryHost
	ranges atomic.Bool // it has answered a range with 206 before
}

// repository is a place to get manifests and blobs from.
type repository struct {
	client *Client
	spec   reference.Spec // its Object is not used: repositories are shared
	name   string         // path below the host
	sites  []site
}

// site is an endpoint with the tokens for one repository: scopes differ, so
// tokens of two repositories must not mix.
type site struct {
	*endpoint
	auth *authState
}

// repository parses ref and returns its repository, tag and digest.
func (c *Client) repository(ctx context.Context, ref string) (*repository, reference.Spec, error) {
	named, err := distref.ParseDockerRef(ref)
	if err != nil {
		return nil, reference.Spec{}, fmt.Errorf("image reference %q: %w", ref, err)
	}
	spec, err := reference.Parse(named.String())
	if err != nil {
		return nil, reference.Spec{}, fmt.Errorf("image reference %q: %w", ref, err)
	}
	set, err := c.hostSet(ctx, spec.Hostname())
	if err != nil {
		return nil, reference.Spec{}, fmt.Errorf("hosts of %s: %w", spec.Hostname(), err)
	}
	return set.repository(c, spec), spec, nil
}

func (s *hostSet) repository(c *Client, spec reference.Spec) *repository {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.repos[spec.Locator]; ok {
		return r
	}
	if len(s.repos) >= maxRepositories {
		clear(s.repos)
	}
	r := &repository{
		client: c,
		spec:   spec,
		name:   strings.TrimPrefix(spec.Locator, spec.Hostname()+"/"),
	}
	for _, ep := range s.hosts {
		r.sites = append(r.sites, site{ep, newAuthState(c.creds, spec.Locator, ep.RegistryHost)})
	}
	s.repos[spec.Locator] = r
	return r
}

// hostSet returns the hosts of a registry. They are kept, for their connections
// and tokens, until the registry's hosts.toml changes.
func (c *Client) hostSet(ctx context.Context, name string) (*hostSet, error) {
	dir, stamp := c.hostsDir(name)
	c.mu.Lock()
	set := c.hosts[name]
	c.mu.Unlock()
	if set != nil && set.stamp == stamp {
		return set, nil
	}
	fresh, err := c.configureHosts(ctx, name, dir, stamp)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.hosts[name]; now != set && now != nil && now.stamp == stamp {
		return now, nil // somebody else was faster
	}
	if set != nil {
		set.closeIdle()
	}
	c.hosts[name] = fresh
	return fresh, nil
}

// hostsDir returns the directory that configures a registry, "" if none does,
// and a stamp that changes with its content.
func (c *Client) hostsDir(name string) (dir, stamp string) {
	if c.cfg.HostsDir == "" {
		return "", ""
	}
	dir, err := dockerconfig.HostDirFromRoot(c.cfg.HostsDir)(name)
	if err != nil || dir == "" {
		return "", ""
	}
	info, err := os.Stat(filepath.Join(dir, "hosts.toml"))
	if err != nil {
		return dir, dir // certificates only
	}
	return dir, fmt.Sprintf("%s %d %d", dir, info.Size(), info.ModTime().UnixNano())
}

func (c *Client) configureHosts(ctx context.Context, name, dir, stamp string) (*hostSet, error) {
	set := &hostSet{stamp: stamp, repos: map[string]*repository{}}
	opts := dockerconfig.HostOptions{
		HostDir: func(string) (string, error) {
			if dir == "" {
				return "", errdefs.ErrNotFound
			}
			return dir, nil
		},
		UpdateClient: func(client *http.Client) error {
			tr, ok := client.Transport.(*http.Transport)
			if !ok {
				return fmt.Errorf("unexpected HTTP transport %T", client.Transport)
			}
			client.CheckRedirect = checkRedirect
			c.tune(tr)
			set.transports = append(set.transports, tr)
			return nil
		},
	}
	if _, port, _ := net.SplitHostPort(name); port != "" && port != "443" && docker.IsLocalhost(name) {
		opts.DefaultScheme = "http"
	}
	hosts, err := dockerconfig.ConfigureHosts(ctx, opts)(name)
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		set.hosts = append(set.hosts, &endpoint{RegistryHost: h})
	}
	return set, nil
}

// tune makes containerd's HTTP transport fit for many ranges at once. HTTP/2
// stays off, as containerd has it: ranges want connections of their own.
func (c *Client) tune(tr *http.Transport) {
	tr.MaxIdleConns = 0
	tr.MaxIdleConnsPerHost = 64
	tr.IdleConnTimeout = 90 * time.Second
	tr.DisableCompression = true // bytes must be those of the digest
	if c.cfg.DialContext != nil {
		tr.DialContext = c.cfg.DialContext
	}
}

// checkRedirect keeps credentials, and headers of hosts.toml, which often are
// some, at the host they are meant for. net/http would also send them to
// subdomains and other ports.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	first := via[0].URL
	if req.URL.Host == first.Host && req.URL.Scheme == first.Scheme {
		return nil
	}
	kept := http.Header{}
	for _, name := range []string{"Range", "Accept", "Accept-Encoding", "User-Agent", "Referer"} {
		if v, ok := req.Header[name]; ok {
			kept[name] = v
		}
	}
	req.Header = kept
	return nil
}

func (s *hostSet) closeIdle() {
	for _, tr := range s.transports {
		tr.CloseIdleConnections()
	}
}

// with returns the sites that may do what caps asks for.
func (r *repository) with(caps docker.HostCapabilities) []site {
	var out []site
	for _, s := range r.sites {
		if s.Capabilities.Has(caps) {
			out = append(out, s)
		}
	}
	return out
}
