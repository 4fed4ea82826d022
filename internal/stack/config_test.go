package stack_test

import (
	"errors"
	"flag"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/deploy"
	"github.com/hearth-serverless/hearth/internal/stack"
)

var update = flag.Bool("update", false, "write the golden files again")

func valid() stack.Config {
	return stack.Config{
		Name: "test", Root: "/var/lib/hearth", Run: "/run/hearth", Tools: "/opt/tools", Bin: "/opt/bin",
		Subnet: netip.MustParsePrefix("10.210.16.0/20"), Registry: true,
	}
}

func TestRenderedConfigurations(t *testing.T) {
	for _, c := range []struct {
		name       string
		change     func(*stack.Config)
		masquerade string
		apparmor   bool
	}{
		{"plain", func(*stack.Config) {}, "", false},
		{"all", func(c *stack.Config) { c.LocalPull = true; c.HostsDir = `/etc/a "b"/certs.d` }, "nftables", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := valid()
			c.change(&cfg)
			cfg, err := cfg.WithDefaults()
			if err != nil {
				t.Fatal(err)
			}
			got, err := cfg.Rendered([]string{deploy.Containerd, deploy.CNI, deploy.Registry}, c.masquerade, c.apparmor)
			if err != nil {
				t.Fatal(err)
			}
			for i, file := range []string{"containerd.toml", "hearth.conflist", "registry.yaml"} {
				golden(t, c.name+"-"+file, got[i])
			}
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; go test -update writes it. Got:\n%s", name, got)
	}
}

func TestConfigProblems(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*stack.Config)
		want   string
	}{
		{"good", func(*stack.Config) {}, ""},
		{"name", func(c *stack.Config) { c.Name = "No/pe" }, "name"},
		{"relative root", func(c *stack.Config) { c.Root = "data" }, "absolute"},
		{"run in root", func(c *stack.Config) { c.Run = c.Root + "/run" }, "in the other"},
		{"public gateway", func(c *stack.Config) { c.GatewayAddress = "0.0.0.0:80" }, "loopback"},
		{"no port", func(c *stack.Config) { c.RegistryAddress = "127.0.0.1" }, "HOST:PORT"},
		{"long run", func(c *stack.Config) { c.Run = "/run/" + strings.Repeat("x", 40) }, "shorter directory"},
		{"narrow subnet", func(c *stack.Config) { c.Subnet = netip.MustParsePrefix("10.0.0.0/30") }, "subnet"},
		{"unclean subnet", func(c *stack.Config) { c.Subnet = netip.MustParsePrefix("10.0.0.1/20") }, "subnet"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := valid()
			c.change(&cfg)
			_, err := cfg.WithDefaults()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestPreflightSaysTheNextStep(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	cfg := valid()
	cfg.Tools, cfg.Bin = t.TempDir(), t.TempDir()
	cfg.GatewayAddress, cfg.RegistryAddress, cfg.Sidecar = "127.0.0.1:0", "127.0.0.1:0", true
	cfg, err := cfg.WithDefaults()
	if err != nil {
		t.Fatal(err)
	}
	err = cfg.Preflight()
	for _, want := range []string{"containerd, containerd-shim-runc-v2, ctr, runc, cni/ptp", "make tools", "nodeagent, launcher, logwriter, poolmanager, gateway, sidecar", "make build", "--pause-image"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("does not say %q: %v", want, err)
		}
	}
}

// A port that was chosen is kept free for who was told of it, and serves him as often as he starts.
func TestPortsAreKept(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		if l, err := net.Listen("tcp", host+":0"); err != nil {
			t.Logf("there is no %s: %v", host, err)
			continue
		} else if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		c, release, err := stack.Config{GatewayAddress: host + ":0", RegistryAddress: "127.0.0.1:5000"}.TakePorts()
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		if c.RegistryAddress != "127.0.0.1:5000" || !strings.HasPrefix(c.GatewayAddress, host+":") {
			t.Errorf("took %s and %s", c.GatewayAddress, c.RegistryAddress)
		}
		if _, err := net.Dial("tcp", c.GatewayAddress); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("before anyone listens: %v", err)
		}
		for range 2 {
			l, err := net.Listen("tcp", c.GatewayAddress)
			if err != nil {
				t.Fatal(err)
			}
			conn, err := net.Dial("tcp", c.GatewayAddress)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(conn.Close(), l.Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestKernelCheck(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("nodev\ttmpfs\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := stack.CheckKernel(file, file)
	for _, want := range []string{"modprobe overlay", "mount -t cgroup2"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("does not say %q: %v", want, err)
		}
	}
}

func TestChooseSubnet(t *testing.T) {
	p := netip.MustParsePrefix
	none := netip.Prefix{}
	first, err := stack.ChooseSubnet(none, none, "a", nil)
	if err != nil || first.Bits() != 20 || !p("10.208.0.0/12").Overlaps(first) && !p("10.224.0.0/11").Overlaps(first) {
		t.Fatalf("chose %s, %v", first, err)
	}
	second, err := stack.ChooseSubnet(none, none, "a", []netip.Prefix{first, p("192.168.0.0/16")})
	if err != nil || second.Overlaps(first) {
		t.Errorf("chose %s over %s, %v", second, first, err)
	}
	if got, err := stack.ChooseSubnet(none, p("10.1.0.0/20"), "a", []netip.Prefix{first}); err != nil || got != p("10.1.0.0/20") {
		t.Errorf("the one before: %s, %v", got, err)
	}
	if got, err := stack.ChooseSubnet(none, first, "a", []netip.Prefix{first}); err != nil || got.Overlaps(first) {
		t.Errorf("the one before, taken meanwhile: %s, %v", got, err)
	}
	if _, err := stack.ChooseSubnet(p("10.2.0.0/16"), none, "a", []netip.Prefix{p("10.2.3.0/24")}); err == nil || !strings.Contains(err.Error(), "10.2.3.0/24") {
		t.Errorf("a taken one that was asked for: %v", err)
	}
	if _, err := stack.ChooseSubnet(none, none, "a", []netip.Prefix{p("10.0.0.0/8")}); err == nil {
		t.Error("found one where all is taken")
	}
}

func TestMasqueradeBackend(t *testing.T) {
	for program, want := range map[string]string{"iptables": "iptables", "nft": "nftables", "other": ""} {
		got := stack.MasqueradeBackend(func(name string) (string, error) {
			if name == program {
				return name, nil
			}
			return "", errors.New("not found")
		})
		if got != want {
			t.Errorf("with %s: %q, want %q", program, got, want)
		}
	}
}

func TestChildEnv(t *testing.T) {
	got := valid().ChildEnv([]string{"PATH=/bin", "HEARTH_CONFIG=x", "HEARTH_LOG_FORMAT=json", "HOME=/root", "HEARTH_STACK=/other"})
	want := []string{"HEARTH_LOG_FORMAT=json", "HOME=/root", "HEARTH_STACK=/run/hearth", "PATH=/opt/tools:/bin:/usr/sbin:/sbin", "OTEL_TRACES_EXPORTER=none"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
