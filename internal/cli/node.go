package cli

import (
	"context"
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
	c.AddCommand(a.nodeDoctor(), a.nodeCache())
	return c
}

const doctorLong = `Checks all that keeps images from being pulled through Hearth's snapshotter: containerd's configuration with its
imports, what the containerd that runs makes of it, the kernel, nodeagent, cgroups and the disk. Each finding says what it
means and the line to change. It changes nothing. The exit code is 1 if there is a problem.

With --config - it reads what "containerd config dump" prints, and looks at nothing but that.`

func (a *app) nodeDoctor() *cobra.Command {
	var out format
	var config, snapshotter, socket, kubelet string
	c := &cobra.Command{
		Annotations: map[string]string{onMachine: "run it on the node itself; `hearth doctor` looks at a cluster"},
		Use:         "doctor", Short: "Say what keeps this node from pulling images through Hearth", Long: doctorLong, Args: takes(0, 0, ""),
		Example: "  sudo hearth node doctor\n  containerd config dump | hearth node doctor --config -\n  sudo hearth node doctor --config /run/hearth/config/containerd.toml",
		RunE: func(c *cobra.Command, _ []string) error {
			if socket == "" {
				socket = filepath.Join(a.run, stack.NodeSocket)
			}
			findings, err := a.examine(c.Context(), places{config, snapshotter, socket, kubelet})
			if err != nil {
				return err
			}
			return a.report(findings, "this node", out)
		},
	}
	c.Flags().StringVar(&config, "config", "/etc/containerd/config.toml", "containerd's configuration, or - for a dump of it on standard input")
	c.Flags().StringVar(&snapshotter, "snapshotter", "hearth", "name of the proxy plugin")
	c.Flags().StringVar(&socket, "node-socket", "", "nodeagent's socket (default: the one in --run)")
	c.Flags().StringVar(&kubelet, "kubelet-config", "/var/lib/kubelet/config.yaml", "the kubelet's configuration, if there is a kubelet")
	out.add(c.Flags())
	return c
}

// places are where what a node's doctor looks at is.
type places struct {
	config, snapshotter string
	socket              string // nodeagent's
	kubelet             string // its configuration; empty if there is none
}

func (a *app) examine(ctx context.Context, p places) ([]doctor.Finding, error) {
	if p.config == "-" {
		config, err := doctor.Parse(a.in)
		if err != nil {
			return nil, err
		}
		return doctor.Diagnose(config, nil, p.snapshotter), nil
	}
	return diagnose(ctx, p)
}

func diagnose(ctx context.Context, p places) ([]doctor.Finding, error) {
	config, err := doctor.Load(p.config)
	if err != nil {
		return nil, fmt.Errorf("%w; name containerd's configuration with `hearth node doctor --config`", err)
	}
	address, root := config.Proxy(p.snapshotter)
	facts, err := doctor.Probe(ctx, doctor.Places{
		Containerd: config.Socket(), Snapshotter: address, Name: p.snapshotter, Root: root, Nodeagent: p.socket, Kubelet: p.kubelet,
	})
	if err != nil {
		return nil, err
	}
	return doctor.Diagnose(config, facts, p.snapshotter), nil
}

const clusterDoctorLong = `Checks all that keeps functions from starting, and what you may do. On a cluster: Hearth's kinds and their version, the daemons, the
leader, the nodes, the certificates between the daemons, your own rights, and whether the gateway can be reached. On a single machine what
"hearth node doctor" checks, of the deployment's own containerd. It changes nothing. The exit code is 1 if there is a problem.`

// doctorCommand is hearth doctor: of the deployment, whatever it is.
func (a *app) doctorCommand() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "doctor", Short: "Say what keeps functions from starting", Long: clusterDoctorLong, Args: takes(0, 0, ""),
		Example: "  hearth doctor\n  hearth doctor --context production -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			d, err := a.deployment()
			if err != nil {
				return err
			}
			findings, err := d.Diagnose(c.Context())
			if err != nil {
				return a.explain(err, "examine the deployment")
			}
			return a.report(findings, "this deployment", out)
		},
	}
	out.add(c.Flags())
	return c
}

// report prints findings; the error is that there are problems among them.
func (a *app) report(findings []doctor.Finding, of string, out format) error {
	if err := a.printFindings(findings, out); err != nil {
		return err
	}
	if doctor.Failed(findings) {
		return fmt.Errorf("%s has problems; mend them from the top, the later ones can follow from the first", of)
	}
	return nil
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
