package cli

import (
	"context"

	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// complete offers names, which have to come soon: a user waits at the prompt.
func complete(c *cobra.Command, args []string, names func(context.Context) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(c.Context(), completionTime)
	defer cancel()
	list, err := names(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return list, cobra.ShellCompDirectiveNoFileComp
}

// completeFunction offers the names of Functions.
func (a *app) completeFunction(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return complete(c, args, func(ctx context.Context) (names []string, _ error) {
		list, err := a.functionList(ctx)
		for _, f := range list {
			names = append(names, f.GetName())
		}
		return names, err
	})
}

func (a *app) functionList(ctx context.Context) ([]*hearthv1.Function, error) {
	d, err := a.deployment()
	if err != nil {
		return nil, err
	}
	list, err := d.Functions(ctx)
	if err != nil {
		return nil, a.explain(err, "list functions")
	}
	return list, nil
}

func (a *app) instanceList(ctx context.Context, function string) ([]*hearthv1.Instance, error) {
	d, err := a.deployment()
	if err != nil {
		return nil, err
	}
	list, err := d.Instances(ctx, function)
	if err != nil {
		return nil, a.explain(err, "list instances")
	}
	return list, nil
}
