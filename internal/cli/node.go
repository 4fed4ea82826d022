package cli

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hearth-serverless/hearth/internal/doctor"
	"github.com/hearth-serverless/hearth/internal/stack"
)

func (a *app) nodeCommands() *cobra.Command {
	c := &cobra.Command{
		Use: "node", Short: "Look after this node", Args: subcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.doctor())
	return c
}

const doctorLong = `Checks all that keeps images from being pulled through Hearth's snapshotter: containerd's configuration with its
imports, what the containerd that runs makes of it, the kernel, nodeagent, cgroups and the disk. Each finding says what it
means and the line to change. It changes nothing. The exit code is 1 if there is a problem.

With --config - it reads what "containerd config dump" prints, and looks at nothing but that.`

func (a *app) doctor() *cobra.Command {
	var out format
	var config, snapshotter, socket, kubelet string
	c := &cobra.Command{
		Use: "doctor", Short: "Say what keeps this node from pulling images through Hearth", Long: doctorLong, Args: takes(0, 0, ""),
		Example: "  sudo hearth node doctor\n  containerd config dump | hearth node doctor --config -\n  sudo hearth node doctor --config /run/hearth/config/containerd.toml",
		RunE: func(c *cobra.Command, _ []string) error {
			if socket == "" {
				socket = filepath.Join(a.run, stack.NodeSocket)
			}
			findings, err := a.examine(c, config, snapshotter, socket, kubelet)
			if err != nil {
				return err
			}
			if err := a.printFindings(findings, out); err != nil {
				return err
			}
			if doctor.Failed(findings) {
				return errors.New("this node has problems; mend them from the top, the later ones can follow from the first")
			}
			return nil
		},
	}
	c.Flags().StringVar(&config, "config", "/etc/containerd/config.toml", "containerd's configuration, or - for a dump of it on standard input")
	c.Flags().StringVar(&snapshotter, "snapshotter", "hearth", "name of the proxy plugin")
	c.Flags().StringVar(&socket, "node-socket", "", "nodeagent's socket (default: the one in --run)")
	c.Flags().StringVar(&kubelet, "kubelet-config", "/var/lib/kubelet/config.yaml", "the kubelet's configuration, if there is a kubelet")
	out.add(c.Flags())
	return c
}

func (a *app) examine(c *cobra.Command, path, snapshotter, socket, kubelet string) ([]doctor.Finding, error) {
	if path == "-" {
		config, err := doctor.Parse(a.in)
		if err != nil {
			return nil, err
		}
		return doctor.Diagnose(config, nil, snapshotter), nil
	}
	config, err := doctor.Load(path)
	if err != nil {
		return nil, fmt.Errorf("%w; name containerd's configuration with --config", err)
	}
	address, root := config.Proxy(snapshotter)
	facts, err := doctor.Probe(c.Context(), doctor.Places{
		Containerd: config.Socket(), Snapshotter: address, Name: snapshotter, Root: root, Nodeagent: socket, Kubelet: kubelet,
	})
	if err != nil {
		return nil, err
	}
	return doctor.Diagnose(config, facts, snapshotter), nil
}

func (a *app) printFindings(findings []doctor.Finding, out format) error {
	if out == formatJSON {
		return a.printJSON(findings)
	}
	rows := [][]string{{"STATUS", "CHECK", "FOUND"}}
	for _, f := range findings {
		rows = append(rows, []string{string(f.Status), f.Check, f.Found})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	for _, f := range findings {
		if f.Status == doctor.OK {
			continue
		}
		if err := a.printf("\n%s %s: %s\n  %s\n  %s\n", strings.ToUpper(string(f.Status)), f.Check, f.Found, f.Meaning, f.Fix); err != nil {
			return err
		}
	}
	return nil
}
