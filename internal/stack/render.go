package stack

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"text/template"

	"github.com/hearth-serverless/hearth/deploy"
)

// PauseRef is the image of the process that holds a sandbox's namespaces open; Hearth makes it itself.
const PauseRef = "hearth.local/pause:1"

// values is what the templates of package deploy may use.
type values struct {
	ContainerdRoot, ContainerdState, ContainerdSocket, ContainerdTTRPC string
	SnapshotterSocket, SnapshotterRoot                                 string
	PauseRef, HostsDir, Platform, Shim, Runc, RuncRoot                 string
	CNIBin, CNIConf, OptDir, ShimSockets                               string
	LocalPull, DisableAppArmor                                         bool
	Network, LeaseDir, Subnet, MasqueradeBackend                       string
	Masquerade                                                         bool
	RegistryRoot, RegistryAddress                                      string
}

func (c Config) values(masquerade string, apparmor bool) values {
	p := c.paths()
	return values{
		ContainerdRoot: p.containerdRoot(), ContainerdState: p.containerdState(),
		ContainerdSocket: p.containerdSocket(), ContainerdTTRPC: p.containerdSocket() + ".ttrpc",
		SnapshotterSocket: p.snapshotterSocket(), SnapshotterRoot: p.snapshotterRoot(),
		PauseRef: PauseRef, HostsDir: c.HostsDir, Platform: "linux/" + runtime.GOARCH,
		Shim: filepath.Join(c.Tools, "containerd-shim-runc-v2"), Runc: filepath.Join(c.Tools, "runc"), RuncRoot: filepath.Join(c.Run, "runc"),
		CNIBin: filepath.Join(c.Tools, "cni"), CNIConf: p.cniDir(), OptDir: filepath.Join(c.Root, "opt"), ShimSockets: p.shimSockets(),
		LocalPull: c.LocalPull, DisableAppArmor: !apparmor,
		Network: c.network(), LeaseDir: p.leases(), Subnet: c.Subnet.String(), Masquerade: masquerade != "", MasqueradeBackend: masquerade,
		RegistryRoot: p.registryRoot(), RegistryAddress: c.RegistryAddress,
	}
}

// network is the name of the CNI network.
func (c Config) network() string { return "hearth-" + c.Name }

// writeConfigs renders the configuration of containerd, its network, and the registry into the Run folder.
func (c Config) writeConfigs() error {
	v := c.values(masqueradeBackend(exec.LookPath), hasAppArmor())
	p := c.paths()
	for _, f := range []struct{ path, text string }{
		{p.containerdConfig(), deploy.Containerd},
		{filepath.Join(p.cniDir(), "10-hearth.conflist"), deploy.CNI},
		{p.registryConfig(), deploy.Registry},
	} {
		text, err := render(f.text, v)
		if err != nil {
			return fmt.Errorf("configuration %s: %w", f.path, err)
		}
		if err := os.MkdirAll(filepath.Dir(f.path), 0o700); err != nil {
			return fmt.Errorf("configuration: %w", err)
		}
		if err := os.WriteFile(f.path, []byte(text), 0o600); err != nil {
			return fmt.Errorf("configuration: %w", err)
		}
	}
	return nil
}

func render(text string, v values) (string, error) {
	t, err := template.New("configuration").Option("missingkey=error").Funcs(template.FuncMap{"json": quote}).Parse(text)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	if err := t.Execute(&b, v); err != nil {
		return "", err
	}
	return b.String(), nil
}

// quote writes a string as JSON does, which TOML and YAML read as well.
func quote(s string) (string, error) {
	b, err := json.Marshal(s)
	return string(b), err
}

// masqueradeBackend is what the network plugin can use to let Instances reach beyond the machine: "" when there is nothing,
// and then they reach the machine only.
func masqueradeBackend(lookPath func(string) (string, error)) string {
	for _, b := range []struct{ program, name string }{{"iptables", "iptables"}, {"nft", "nftables"}} {
		if _, err := lookPath(b.program); err == nil {
			return b.name
		}
	}
	return ""
}

// hasAppArmor says whether containers can get an AppArmor profile here.
func hasAppArmor() bool {
	enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	if err != nil || !strings.HasPrefix(string(enabled), "Y") {
		return false
	}
	_, err = exec.LookPath("apparmor_parser")
	return err == nil
}
