package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/hearth-serverless/hearth/internal/stack"
)

const downLong = `Ends the deployment: requests in flight are finished, then functions, daemons, mounts, network namespaces and cgroups go.
Functions and images stay in --root for the next "hearth up", unless --purge is said. It works as well, and clears up the same,
when the supervisor was killed.`

func (a *app) down() *cobra.Command {
	var purge bool
	config := stack.Config{}
	c := &cobra.Command{
		Annotations: map[string]string{onMachine: "a cluster has `hearth uninstall`"},
		Use:         "down", Short: "Take Hearth down and leave nothing running", Long: downLong, Args: takes(0, 0, ""),
		Example: "  sudo hearth down\n  sudo hearth down --purge      and forget all functions and images",
		RunE: func(c *cobra.Command, _ []string) error {
			config.Run = a.run
			// What is up, or was when it died, knows its own name and root better than flags do.
			if s, err := stack.LastStatus(a.run); err == nil && s.Name != "" && s.Root != "" {
				config.Name, config.Root = s.Name, s.Root
			}
			if err := absolute(&config.Run, &config.Root); err != nil {
				return err
			}
			err := stack.Down(c.Context(), config)
			if err != nil && (!purge || !errors.Is(err, stack.ErrDown)) {
				return interrupted(c.Context(), err)
			}
			if err == nil {
				a.note("Hearth is down.")
			}
			if purge {
				return a.purge(config.Root)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&purge, "purge", false, "remove the data as well: functions, images, logs")
	c.Flags().StringVar(&config.Name, "name", stack.DefaultName, "name of the deployment, if nothing in --run tells it")
	c.Flags().StringVar(&config.Root, "root", stack.DefaultRoot, "folder of the data, if nothing in --run tells it")
	return c
}

func absolute(paths ...*string) error {
	for _, path := range paths {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return fmt.Errorf("folder %s: %w", *path, err)
		}
		*path = abs
	}
	return nil
}

// purge removes the data, and only from a folder that is a deployment's.
func (a *app) purge(root string) error {
	if _, err := os.Stat(root); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if !stack.IsRoot(root) {
		return fmt.Errorf("purge %s: this is no data folder of Hearth; remove it yourself if it is not needed", root)
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("purge: %w", err)
	}
	var problems []error
	for _, e := range entries {
		problems = append(problems, os.RemoveAll(filepath.Join(root, e.Name())))
	}
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("purge %s: %w", root, err)
	}
	_ = os.Remove(root) // it may be a mount point: then it stays, empty
	a.note("All data in %s is removed.", root)
	return nil
}
