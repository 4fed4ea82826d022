package stack

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// Where a deployment is when nothing else is said.
const (
	DefaultName            = "default"
	DefaultRoot            = "/var/lib/hearth"
	DefaultRun             = "/run/hearth"
	DefaultGatewayAddress  = "127.0.0.1:8080"
	DefaultRegistryAddress = "127.0.0.1:5000"
	DefaultPoolSize        = 2
)

// Config of a deployment. The zero value of each field means the default named there.
type Config struct {
	// Name tells deployments on one machine apart: cgroups are below /hearth-NAME. Default DefaultName.
	Name string
	// Root holds the data and Run the sockets; absolute; nothing else may live in them. Defaults DefaultRoot, DefaultRun.
	Root, Run string
	// Tools has containerd, ctr, containerd-shim-runc-v2, runc, registry and cni/. Required to run.
	Tools string
	// Bin has nodeagent, launcher, logwriter, poolmanager, gateway and, for Sidecar, sidecar. Default: the folder of this executable.
	Bin string
	// PauseImage is an archive of hearth.local/pause:1, as `make build` writes it. Default pause.tar in Bin.
	PauseImage string
	// GatewayAddress is HOST:PORT for users, on loopback; port 0 takes a free one. Default DefaultGatewayAddress.
	GatewayAddress string
	// Registry starts a private registry on RegistryAddress (loopback; port 0 takes a free one), default DefaultRegistryAddress.
	Registry        bool
	RegistryAddress string
	// HostsDir has hosts.toml files for registries, as containerd reads them. Default: certs.d in Root.
	HostsDir string
	// PoolSize is how many sandboxes are kept warm. Default DefaultPoolSize; negative is none.
	PoolSize int
	// Sidecar gives each Instance one: a program that takes its Function's requests (docs/SIDECAR.md).
	Sidecar bool
	// Subnet gives Instances their addresses. Default: a free one is chosen.
	Subnet netip.Prefix
	// NodeFlags are more flags of nodeagent, for measurements.
	NodeFlags []string
	// LocalPull has the CRI pull by its older path instead of the Transfer service.
	LocalPull bool
	// LogLevel of Hearth's daemons. Default info.
	LogLevel string
	// Logger of the supervisor. Default: none.
	Logger *slog.Logger
	// Progress, when set, gets a line for a human at each step.
	Progress func(line string)
}

var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)

// WithDefaults completes a Config and says what is wrong with it, all at once.
func (c Config) WithDefaults() (Config, error) {
	setDefault(&c.Name, DefaultName)
	setDefault(&c.Root, DefaultRoot)
	setDefault(&c.Run, DefaultRun)
	setDefault(&c.GatewayAddress, DefaultGatewayAddress)
	setDefault(&c.RegistryAddress, DefaultRegistryAddress)
	setDefault(&c.HostsDir, filepath.Join(c.Root, "certs.d"))
	setDefault(&c.PoolSize, DefaultPoolSize)
	setDefault(&c.LogLevel, "info")
	c.PoolSize = max(0, c.PoolSize)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	if c.Bin == "" {
		self, err := os.Executable()
		if err != nil {
			return c, fmt.Errorf("find the folder of this program: %w; name it with --bin", err)
		}
		c.Bin = filepath.Dir(self)
	}
	setDefault(&c.PauseImage, filepath.Join(c.Bin, "pause.tar"))
	return c, c.check()
}

func (c Config) check() error {
	var problems []error
	if !validName.MatchString(c.Name) {
		problems = append(problems, fmt.Errorf("name %q: use up to 40 lower-case letters, digits and dashes", c.Name))
	}
	for what, path := range map[string]string{"root": c.Root, "run": c.Run} {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			problems = append(problems, fmt.Errorf("%s directory %q: must be a clean absolute path", what, path))
		}
	}
	if within(c.Root, c.Run) || within(c.Run, c.Root) {
		problems = append(problems, fmt.Errorf("root %s and run %s: one must not lie in the other", c.Root, c.Run))
	}
	problems = append(problems, checkLoopback("gateway address", c.GatewayAddress))
	if c.Registry {
		problems = append(problems, checkLoopback("registry address", c.RegistryAddress))
	}
	if c.Subnet.IsValid() && (!c.Subnet.Addr().Is4() || c.Subnet.Bits() > 28 || c.Subnet.Masked() != c.Subnet) {
		problems = append(problems, fmt.Errorf("subnet %s: must be an IPv4 network of /28 or larger, like 10.200.0.0/20", c.Subnet))
	}
	for _, socket := range c.paths().sockets() {
		problems = append(problems, daemon.CheckSocketPath(socket))
	}
	return errors.Join(problems...)
}

// checkLoopback refuses to offer what has no authentication to others.
func checkLoopback(what, address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%s %q: want HOST:PORT", what, address)
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("%s %q: must be on loopback, such as 127.0.0.1:8080: it has no authentication; put a proxy that has before it", what, address)
	}
	return nil
}

func setDefault[T comparable](v *T, to T) {
	var zero T
	if *v == zero {
		*v = to
	}
}
