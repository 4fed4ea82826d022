// Command ctl starts, ends and shows test clusters: it is what `make cluster` and `make cluster-down` run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/hearth-serverless/hearth/test/cluster"
)

const usage = `usage: ctl [--dir DIR] [--nodes N] COMMAND
  up                    start a cluster
  down                  end it and remove all of it
  status                list what there is of it in the running system
  run NODE COMMAND...   run a command on a node
  kill NODE             end a node as a power failure would
  restart NODE          bring it up again
`

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := command(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func command(ctx context.Context) error {
	config := cluster.Config{Progress: func(line string) { fmt.Fprintln(os.Stderr, "cluster:", line) }}
	flag.StringVar(&config.Dir, "dir", cluster.DefaultDir, "the cluster's folder")
	flag.IntVar(&config.Nodes, "nodes", cluster.DefaultNodes, "how many nodes it gets")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	switch flag.Arg(0) {
	case "up":
		return start(ctx, config)
	case "down":
		err := cluster.Down(ctx, config.Dir)
		if errors.Is(err, cluster.ErrDown) {
			fmt.Fprintln(os.Stderr, "cluster:", err)
			return nil
		}
		return err
	case "status":
		left, err := cluster.Leftovers(config.Dir)
		for _, line := range left {
			fmt.Println(line)
		}
		return err
	case "run", "kill", "restart":
		return onNode(ctx, config.Dir)
	}
	flag.Usage()
	return errors.New("no such command")
}

func start(ctx context.Context, config cluster.Config) error {
	c, err := cluster.Start(ctx, config)
	if errors.Is(err, cluster.ErrUp) {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		c, err = cluster.Open(config.Dir)
	}
	if err != nil {
		return err
	}
	fmt.Printf("export KUBECONFIG=%s\nexport HEARTH_REGISTRY=%s\n", c.Kubeconfig(), c.Registry())
	return nil
}

func onNode(ctx context.Context, dir string) error {
	c, err := cluster.Open(dir)
	if err != nil {
		return err
	}
	node := c.Node(flag.Arg(1))
	if node == nil {
		return fmt.Errorf("there is no node %q", flag.Arg(1))
	}
	switch flag.Arg(0) {
	case "kill":
		return node.Kill(ctx)
	case "restart":
		return node.Restart(ctx)
	}
	if flag.NArg() < 3 {
		return errors.New("run what?")
	}
	cmd, err := node.Command(ctx, flag.Arg(2), flag.Args()[3:]...)
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}
