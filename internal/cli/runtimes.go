package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const runtimeLong = `A runtime is a language that is booted before any function is known: an image whose entrypoint is a loader, with the libraries
that it is told to preload. An instance of it waits, takes the code of the first function that asks, and is that function's from then on.`

func (a *app) runtimeCommands() *cobra.Command {
	c := &cobra.Command{
		Use: "runtime", Aliases: []string{"runtimes"}, Short: "Boot languages before functions ask for them", Long: runtimeLong, Args: subcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.applyRuntime(), a.listRuntimes(), a.deleteRuntime(), a.suggestRuntime())
	return c
}

const applyRuntimeLong = `Creates a runtime, or changes it: what is not said is as at first, whatever it was before. Instances that wait are then booted anew;
those that serve stay as they are. Unless --wait=false, the command returns when the warm instances are booted.`

const applyRuntimeExample = `  hearth runtime apply python --image 127.0.0.1:5000/runtime-python:1 --preload numpy,pandas,flask --warm 2
  hearth runtime apply node --image REF --warm 1 --env NODE_ENV=production`

func (a *app) applyRuntime() *cobra.Command {
	r := &hearthv1.Runtime{}
	var env []string
	var wait bool
	var out format
	c := &cobra.Command{
		Use: "apply NAME --image REF", Short: "Create or change a runtime", Long: applyRuntimeLong, Example: applyRuntimeExample,
		Args: takes(1, 1, "the runtime's NAME"), ValidArgsFunction: a.completeRuntime,
		RunE: func(c *cobra.Command, args []string) (err error) {
			if r.Image == "" {
				return usagef("--image is missing: which image has the loader?")
			}
			if r.Env, err = pairs("--env", env); err != nil {
				return err
			}
			r.Name = args[0]
			return a.runApplyRuntime(c.Context(), r, wait, out)
		},
	}
	c.Flags().StringVar(&r.Image, "image", "", "image whose entrypoint is a loader (required)")
	c.Flags().StringSliceVar(&r.Preload, "preload", nil, "libraries to load while it boots: modules of python and node, classes of java; separated by commas")
	c.Flags().Int32Var(&r.Warm, "warm", 0, "booted instances that wait on each node (default 0: one is booted when a function asks)")
	c.Flags().StringArrayVarP(&env, "env", "e", nil, "KEY=VALUE for the loader; may be repeated")
	c.Flags().BoolVar(&wait, "wait", true, "wait until its image is on the nodes and its warm instances are booted")
	out.add(c.Flags())
	return c
}

func (a *app) runApplyRuntime(ctx context.Context, r *hearthv1.Runtime, wait bool, out format) error {
	start := time.Now()
	d, err := a.deployment()
	if err != nil {
		return err
	}
	var applied *hearthv1.Runtime
	err = a.patiently(ctx, "booting "+r.GetImage(), wait, func(ctx context.Context) (err error) {
		applied, err = d.ApplyRuntime(ctx, r, wait, a.tell)
		return err
	})
	if err != nil {
		return a.explainRuntime(err, "apply runtime "+r.GetName())
	}
	if out == formatJSON {
		return a.printJSON(message(applied))
	}
	return a.printf("runtime %s is applied, generation %d (%.1f s)\n", r.GetName(), applied.GetGeneration(), time.Since(start).Seconds())
}

func (a *app) listRuntimes() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List runtimes", Args: takes(0, 0, ""), Example: "  hearth runtime ls\n  hearth runtime ls -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := a.runtimeList(c.Context())
			if err != nil {
				return err
			}
			if out == formatJSON {
				return a.printJSON(messages(list))
			}
			rows := [][]string{{"NAME", "GENERATION", "WARM", "PRELOAD", "IMAGE"}}
			for _, r := range list {
				rows = append(rows, []string{r.GetName(), fmt.Sprint(r.GetGeneration()), fmt.Sprint(r.GetWarm()), dash(strings.Join(r.GetPreload(), ",")), r.GetImage()})
			}
			return a.table(rows)
		},
	}
	out.add(c.Flags())
	return c
}

func (a *app) deleteRuntime() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME", Aliases: []string{"delete"}, Short: "Delete a runtime and end its waiting instances", Args: takes(1, 1, "the runtime's NAME"),
		Long:    "Deletes a runtime and ends the instances of it that wait. A runtime that a function needs stays: delete or change the function first.",
		Example: "  hearth runtime rm node", ValidArgsFunction: a.completeRuntime,
		RunE: func(c *cobra.Command, args []string) error {
			d, err := a.deployment()
			if err != nil {
				return err
			}
			if err := d.DeleteRuntime(c.Context(), args[0]); err != nil {
				return a.explainRuntime(err, "delete runtime "+args[0])
			}
			a.note("Runtime %s is deleted.", args[0])
			return nil
		},
	}
}

func (a *app) runtimeList(ctx context.Context) ([]*hearthv1.Runtime, error) {
	d, err := a.deployment()
	if err != nil {
		return nil, err
	}
	list, err := d.Runtimes(ctx)
	if err != nil {
		return nil, a.explain(err, "list runtimes")
	}
	return list, nil
}

// completeRuntime offers the names of Runtimes, as an argument or as a flag's value.
func (a *app) completeRuntime(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if c.ValidArgsFunction != nil && len(args) > 0 && c.Parent().Name() == "runtime" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return complete(c, nil, func(ctx context.Context) ([]string, error) {
		list, err := a.runtimeList(ctx)
		return runtimeNames(list), err
	})
}

func runtimeNames(list []*hearthv1.Runtime) (names []string) {
	for _, r := range list {
		names = append(names, r.GetName())
	}
	return names
}

// findRuntime is the Runtime of a name; it spares the user to pack and push code that nothing can run.
func (a *app) findRuntime(ctx context.Context, name string) (*hearthv1.Runtime, error) {
	list, err := a.runtimeList(ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range list {
		if r.GetName() == name {
			return r, nil
		}
	}
	names := runtimeNames(list)
	have := "there is none yet"
	if len(names) > 0 {
		have = "there are " + strings.Join(names, ", ")
	}
	return nil, fmt.Errorf("no runtime is called %s (%s): make it with `hearth runtime apply %s --image REF`", name, have, name)
}

// explainRuntime is explain, with the advice that is about Runtimes.
func (a *app) explainRuntime(err error, doing string) error {
	next := ""
	switch connect.CodeOf(err) {
	case connect.CodeNotFound:
		next = "; see `hearth runtime ls`"
	case connect.CodeFailedPrecondition:
		next = "; see `hearth list`"
	case connect.CodeInternal, connect.CodeResourceExhausted:
	default:
		return a.explain(err, doing)
	}
	var rpc *connect.Error
	if !errors.As(err, &rpc) {
		return a.explain(err, doing)
	}
	return &spoken{text: advise(doing, rpc.Message(), next), err: err}
}
