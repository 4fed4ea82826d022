package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Defaults of a zero Config. Four ranges of 4 MiB keep a loopback or data
// centre registry busy; the budget leaves room for the other stages of a pull
// in a nodeagent that is held under 256 MiB.
const (
	DefaultRangeBytes   = 4 << 20
	DefaultParallel     = 4
	DefaultMemoryBytes  = 64 << 20
	DefaultStallTimeout = 15 * time.Second
)

// Config says where credentials and hosts come from and how much a Client may
// use. The zero value is a working anonymous client.
type Config struct {
	// HostsDir is a directory laid out as containerd's certs.d, with a
	// hosts.toml per registry. Empty: none. It is read again when it changes.
	HostsDir string
	// DockerConfig is the path of a docker config.json with auths or credential
	// helpers. Empty: $DOCKER_CONFIG/config.json or ~/.docker/config.json, which
	// need not exist. It is read at every challenge, so credentials can rotate.
	DockerConfig string
	// Keychain is asked for credentials first, for those that come with a pull: a
	// kubelet's pull secrets. ref is the repository, as in
	// registry.example:5000/team/app, host the one that wants to know. An empty
	// user means that the secret is an identity token; both empty, that there is
	// nothing to tell, and DockerConfig is asked. Nil: none. It is called at every
	// challenge and must be safe for concurrent use.
	Keychain func(ctx context.Context, ref, host string) (user, secret string, err error)
	// RangeBytes is the size of one range; blobs up to it are one request.
	RangeBytes int
	// Parallel is how many ranges of one blob are in flight at once. Up to twice
	// as many may be fetched and wait for the reader.
	Parallel int
	// MemoryBytes bounds the range buffers of all open blobs together. Each open
	// blob has one block (256 KiB, or RangeBytes if smaller) beside it.
	MemoryBytes int64
	// StallTimeout is how long a response body may stay silent before its range
	// is asked for again.
	StallTimeout time.Duration
	// DialContext makes connections. Nil: an ordinary dialer, with the
	// dial_timeout of hosts.toml.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error)
	// Logger receives one debug message per request. Nil: none.
	Logger *slog.Logger
	// Registerer receives the metrics. Nil: they are kept but not exported.
	Registerer prometheus.Registerer
}

// Client reads from registries. It is safe for concurrent use; connections and
// tokens are shared by all calls.
type Client struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	budget  *budget
	creds   *keychain

	mu    sync.Mutex          // guards hosts
	hosts map[string]*hostSet // by the host part of a reference
}

// New checks cfg, fills in its defaults and returns a Client. It is an error if
// a DockerConfig was named and cannot be read, or if the metrics are registered
// already.
func New(cfg Config) (*Client, error) {
	if cfg.RangeBytes < 0 || cfg.Parallel < 0 || cfg.MemoryBytes < 0 || cfg.StallTimeout < 0 {
		return nil, errors.New("registry config: sizes, counts and timeouts must not be negative")
	}
	setDefault(&cfg.RangeBytes, DefaultRangeBytes)
	setDefault(&cfg.Parallel, DefaultParallel)
	setDefault(&cfg.MemoryBytes, DefaultMemoryBytes)
	setDefault(&cfg.StallTimeout, DefaultStallTimeout)
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	creds, err := newKeychain(cfg.DockerConfig)
	if err != nil {
		return nil, fmt.Errorf("read docker config: %w", err)
	}
	creds.pulled = cfg.Keychain
	b := newBudget(cfg.MemoryBytes, min(cfg.RangeBytes, maxBlockBytes))
	m, err := newMetrics(cfg.Registerer, b)
	if err != nil {
		return nil, fmt.Errorf("register registry metrics: %w", err)
	}
	return &Client{
		cfg: cfg, log: log, metrics: m, budget: b, creds: creds,
		hosts: map[string]*hostSet{},
	}, nil
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Close closes idle connections. Blobs that are open stay so.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, set := range c.hosts {
		set.closeIdle()
	}
}
