package cli

import (
	"fmt"

	"github.com/spf13/cobra"
)

func (a *app) image() *cobra.Command {
	c := &cobra.Command{
		Use: "image", Short: "Pull images, and see what is on the node", Args: subcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.pullImage(), a.listImages())
	return c
}

// subcommand is the Args of a command that has only others below it.
func subcommand(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("unknown command %q%s", args[0], suggestions(c, args[0]))
	}
	return nil
}

func megabytes(n int64) string {
	switch {
	case n == 0:
		return "-"
	case n < 1e6:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}
